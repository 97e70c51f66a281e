"""Text as people and accidents write it: encodings, line ends, tables of prompts, brackets without end."""

# ruff: noqa: E501, a row stays on a line

from __future__ import annotations

import json

from faults import fault

SAMPLE = "sample --reward none --dry-run --prompts "
CHECK = "data check "
ROW = json.dumps({"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"})
ITEM = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}
GENEVAL = "bench --dataset geneval --detector shapes --dry-run --data-dir "
BOM = "\ufeff"
DEEP = "[" * 100_000
ALIASES = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk")
)


def many(last: str, good: int = 199) -> str:
    return "".join(json.dumps({"prompt": f"a cat {i}"}) + "\n" for i in range(good)) + last + "\n"


FAULTS = [
    # prompts
    fault("prompts BOM", SAMPLE + "p.txt", 0, r"- a cat\n", {"p.txt": BOM + "a cat\n"}, never="\ufeff|ufeff"),
    fault("prompts BOM stdin", "sample - --reward none --dry-run", 0, r"- a cat\n", stdin=BOM + "a cat\r\n", never="\ufeff|ufeff|\\\\r"),
    fault("prompts CRLF", SAMPLE + "p.txt", 0, r"- a cat\n- a dog\n", {"p.txt": "a cat\r\na dog\r\n"}, never=r"\\r"),
    fault("prompts U+2028 in text", SAMPLE + "p.txt", 0, "pictures: 1", {"p.txt": "a cat\u2028asleep\n"}),
    fault("prompts U+0085 in JSONL", SAMPLE + "p.jsonl", 0, "pictures: 1",
          {"p.jsonl": json.dumps({"prompt": "a\x85cat"}, ensure_ascii=False)}),
    fault("prompts form feed", SAMPLE + "p.txt", 0, "pictures: 1", {"p.txt": "a cat\x0casleep\n"}),
    fault("prompts Latin-1", SAMPLE + "p.txt", 2, "p.txt: not UTF-8 text", {"p.txt": "caf\xe9\n".encode("latin-1")}),
    fault("prompts UTF-16", SAMPLE + "p.txt", 2, "p.txt: UTF-16", {"p.txt": "a cat\n".encode("utf-16")}),
    fault("prompts UTF-16 without a mark", SAMPLE + "p.txt", 2, "UTF-16", {"p.txt": "a cat\n".encode("utf-16-le")}),
    fault("prompts UTF-32", SAMPLE + "p.txt", 2, "p.txt: UTF-32", {"p.txt": "a cat\n".encode("utf-32")}),
    fault("prompts null byte", SAMPLE + "p.txt", 2, "null byte", {"p.txt": b"a cat asleep in the sun\0\n"}),
    fault("prompts a picture", SAMPLE + "p.png", 2, "not UTF-8 text", {"p.png": b"\x89PNG\r\n\x1a\n" + bytes(range(1, 200))}),
    fault("prompts a folder", SAMPLE + "d", 2, "a folder, not a file", {"d/x": ""}),
    fault("prompts missing", SAMPLE + "gone.txt", 2, "--prompts gone.txt: cannot be read: no such file"),
    fault("prompts empty", SAMPLE + "p.txt", 2, "holds no prompt", {"p.txt": ""}),
    fault("prompts blank", SAMPLE + "p.txt", 2, "holds no prompt", {"p.txt": " \n\n"}),
    fault("prompts CSV", SAMPLE + "p.csv", 0, r"- a cat, asleep\n", {"p.csv": 'Prompts,Category\n"a cat, asleep",Colors\n'}, never="Colors"),
    fault("prompts TSV", SAMPLE + "p.tsv", 0, r"- a cat\n", {"p.tsv": "Prompt\tCategory\na cat\tAnimals\n"}, never="Animals"),
    fault("prompts semicolons", SAMPLE + "p.csv", 0, r"- a cat, asleep\n", {"p.csv": BOM + "id;prompt\r\n1;a cat, asleep\r\n"}),
    fault("prompts sep= line", SAMPLE + "p.csv", 0, r"- a cat\n", {"p.csv": "sep=;\r\nprompt;id\r\na cat;1\r\n"}),
    fault("prompts CSV caption", SAMPLE + "p.csv", 0, r"- a cat\n", {"p.csv": "image,caption\nx.png,a cat\n"}),
    fault("prompts CSV without header", SAMPLE + "p.csv", 2, "no column `prompt`: found 'a cat', 'Animals'", {"p.csv": "a cat,Animals\na dog,Animals\n"}),
    fault("prompts CSV column twice", SAMPLE + "p.csv", 2, "'prompt' is there twice", {"p.csv": "prompt,prompt\na,b\n"}),
    fault("prompts CSV empty", SAMPLE + "p.csv", 2, "no column `prompt`: found nothing", {"p.csv": ""}),
    fault("prompts CSV broken quote", SAMPLE + "p.csv", 2, "not CSV after line 1", {"p.csv": 'prompt\n"a cat"x\n'}),
    fault("prompts CSV quote without end", SAMPLE + "p.csv", 2, "not CSV", {"p.csv": 'prompt\n"a cat\n'}),
    fault("prompts JSONL caption", SAMPLE + "p.jsonl", 0, r"- a cat\n", {"p.jsonl": '{"Caption": "a cat"}\n'}),
    fault("prompts JSONL null", SAMPLE + "p.jsonl", 0, "warning: .*line 2 has no prompt but null", {"p.jsonl": '{"prompt": "a cat"}\n{"prompt": null}\n'}, never="None"),
    fault("prompts JSONL empty text", SAMPLE + "p.jsonl", 0, "left out 1 row", {"p.jsonl": '{"prompt": "a cat"}\n""\n'}),
    fault("prompts JSONL all null", SAMPLE + "p.jsonl", 2, "no prompt but null", {"p.jsonl": '{"prompt": null}\n'}),
    fault("prompts JSONL one bad line of many", SAMPLE + "p.jsonl", 0, "left out 1 row .*line 200 is not JSON", {"p.jsonl": many("{oops")}),
    fault("prompts JSONL number of many", SAMPLE + "p.jsonl", 0, "line 200: prompt is a int", {"p.jsonl": many('{"prompt": 7}')}),
    fault("prompts JSONL surrogate", SAMPLE + "p.jsonl", 2, "not UTF-8 text", {"p.jsonl": '{"prompt": "a \\ud800 cat"}\n'}),
    fault("prompts JSONL null character", SAMPLE + "p.jsonl", 2, "null character", {"p.jsonl": '{"prompt": "a \\u0000 cat"}\n'}),
    fault("prompts JSONL bad line", SAMPLE + "p.jsonl", 2, "line 2 is not JSON", {"p.jsonl": '"a"\n{oops\n'}),
    fault("prompts JSONL other keys", SAMPLE + "p.jsonl", 2, "line 1 has no prompt: found 'a', 'b'", {"p.jsonl": '{"a": 1, "b": 2}\n'}),
    fault("prompts JSON deep", SAMPLE + "p.json", 2, "nested too deep", {"p.json": DEEP}),
    fault("prompts JSON deep and closed", SAMPLE + "p.json", 2, "nested too deep|not JSON", {"p.json": "[" * 500 + "]" * 500}),
    fault("prompts JSONL deep", SAMPLE + "p.jsonl", 2, "nested too deep", {"p.jsonl": '{"a":' * 100_000}),
    fault("prompts JSON object", SAMPLE + "p.json", 2, "not a list", {"p.json": '{"prompt": "a cat"}'}),
    fault("prompts JSON huge number", SAMPLE + "p.json", 2, "not JSON", {"p.json": "[" + "9" * 6000 + "]"}),
    fault("score prompts null", "score a.png --prompts p.jsonl", 2, "line 2 has no prompt", {"p.jsonl": '"a"\n{"prompt": null}\n', "a.png": b""}),
    fault("prompt surrogate", ["sample", "caf\udce9", "--reward", "none", "--dry-run"], 2, "not UTF-8 text"),
    fault("prompt of another locale", ["sample", "caf\udcc3\udca9", "--reward", "none", "--dry-run"], 0, "café"),
    fault("prompt null character", ["sample", "a\0b", "--reward", "none", "--dry-run"], 2, "null character"),
    # GenEval's metadata
    fault("geneval BOM", GENEVAL + "g.jsonl", 0, "prompts: 1", {"g.jsonl": BOM + json.dumps(ITEM) + "\r\n"}),
    fault("geneval U+2028", GENEVAL + "g.jsonl", 0, "prompts: 1",
          {"g.jsonl": json.dumps(ITEM | {"prompt": "a\u2028circle"}, ensure_ascii=False)}),
    fault("geneval UTF-16", GENEVAL + "g.jsonl", 2, "UTF-16", {"g.jsonl": json.dumps(ITEM).encode("utf-16")}),
    fault("geneval null prompt", GENEVAL + "g.jsonl", 2, "prompt is missing", {"g.jsonl": json.dumps(ITEM | {"prompt": None})}),
    fault("geneval null prompt of many", GENEVAL + "g.jsonl", 0, "left out 1 row",
          {"g.jsonl": (json.dumps(ITEM) + "\n") * 150 + json.dumps(ITEM | {"prompt": None})}),
    fault("geneval count of 10**9", GENEVAL + "g.jsonl", 2, "count", {"g.jsonl": json.dumps(ITEM | {"include": [{"class": "circle", "count": 10**9}]})}),
    fault("geneval no object", GENEVAL + "g.jsonl", 2, "not an object", {"g.jsonl": "[1]\n"}),
    fault("geneval other tag", GENEVAL + "g.jsonl", 2, "none of GenEval's", {"g.jsonl": json.dumps(ITEM | {"tag": "x"})}),
    fault("geneval includes text", GENEVAL + "g.jsonl", 2, "not GenEval metadata", {"g.jsonl": json.dumps(ITEM | {"include": "circle"})}),
    fault("geneval deep", GENEVAL + "g.jsonl", 2, "nested too deep", {"g.jsonl": DEEP}),
    fault("geneval empty", GENEVAL + "g.jsonl", 2, "holds no prompt", {"g.jsonl": ""}),
    # configs
    fault("config BOM", "sample x --reward none --dry-run --config c.yaml", 0, "steps: 3", {"c.yaml": BOM + "steps: 3\r\n"}),
    fault("config UTF-16", "bench --dry-run --config c.yaml", 2, "UTF-16", {"c.yaml": "seed: 1\n".encode("utf-16")}),
    fault("config deep", "bench --dry-run --config c.yaml", 2, "--config c.yaml: nested too deep", {"c.yaml": "a: " + DEEP}),
    fault("config aliases", "bench --dry-run --config c.yaml", 2, "aliases", {"c.yaml": ALIASES}),
    fault("config holds itself", "bench --dry-run --config c.yaml", 2, "aliases", {"c.yaml": "sigmas: &a [*a]\n"}),
    fault("config key twice", "bench --dry-run --config c.yaml", 2, "'seed' is there twice", {"c.yaml": "seed: 1\nseed: 2\n"}),
    fault("config tag", "bench --dry-run --config c.yaml", 2, "not YAML", {"c.yaml": "seed: !!python/object/apply:os.system [ls]\n"}),
    fault("config bad int", "bench --dry-run --config c.yaml", 2, "not YAML", {"c.yaml": "seed: !!int ''\n"}),
    fault("config bad bool", "bench --dry-run --config c.yaml", 2, "not YAML", {"c.yaml": "seed: !!bool x\n"}),
    fault("config bad date", "bench --dry-run --config c.yaml", 2, "not YAML", {"c.yaml": "seed: !!timestamp x\n"}),
    fault("config huge number", "bench --dry-run --config c.yaml", 2, "not YAML", {"c.yaml": "seed: " + "9" * 6000}),
    fault("config folder", "bench --dry-run --config d", 2, "a folder, not a file", {"d/x": ""}),
    fault("config large value", "bench --dry-run --config c.yaml", 2, "seed", {"c.yaml": "seed: " + "x" * 100_000}),
    fault("config binary", "bench --dry-run --config c.yaml", 2, "not UTF-8", {"c.yaml": bytes(range(256))}),
    fault("set deep", ["bench", "--dry-run", "--set", "sigmas=" + DEEP[:5000]], 2, "nested too deep"),
    fault("set surrogate", ["bench", "--dry-run", "--set", "out=r\udce9"], 2, "not UTF-8 text"),
    fault("set large", ["bench", "--dry-run", "--set", "seed=" + "x" * 50_000], 2, "--set seed"),
    fault("set no YAML", ["bench", "--dry-run", "--set", "seed=[1"], 2, "--set seed: the value: not YAML"),
    # own files of pairs
    fault("pairs UTF-16", CHECK + "a.jsonl", 2, "UTF-16", {"a.jsonl": ROW.encode("utf-16")}),
    fault("pairs U+2028", CHECK + "a.jsonl", 1, "unreadable images.*2:", {"a.jsonl": ROW.replace("a cat", "a\u2028cat")}),
    fault("pairs deep", CHECK + "a.jsonl", 2, "nested too deep", {"a.jsonl": DEEP}),
    fault("pairs key twice", CHECK + "a.jsonl", 2, "'chosen' is there twice",
          {"a.jsonl": '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}'}),
    fault("pairs surrogate", CHECK + "a.jsonl", 2, "not UTF-8", {"a.jsonl": ROW.replace("a cat", "a \\ud800")}),
    fault("pairs name surrogate", CHECK + "a.jsonl", 2, "not UTF-8", {"a.jsonl": ROW.replace("a.png", "\\udce9.png")}),
    fault("pairs null character", CHECK + "a.jsonl", 2, "null character", {"a.jsonl": ROW.replace("a cat", "a \\u0000")}),
]  # fmt: skip
