"""Who may import whom, held by reading the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import drmcli

ROOT = Path(drmcli.__file__).parent
GROUND = {"__init__", "errors", "files", "signals", "run", "results", "report", "plots", "sheets", "hub", "cards",
          "tiny.world", "tiny.judge", "tiny.tasks"}  # fmt: skip
"""Single modules that do without torch, besides the folders below."""
GROUND_FOLDERS = ("config", "data", "measure")
WITH_TORCH = {"data.cache", "data.batches", "data.sources", "data.store", "measure.detect"}
"""Modules of those folders that hold tensors."""


def ground() -> set[str]:
    """Modules that do without torch: a new file of a folder is covered at once."""
    inside = {m for m in modules() if m.split(".")[0] in GROUND_FOLDERS}
    return GROUND | inside - WITH_TORCH


MODELS = {"generator", "kernels", "parts", "reward", "policy", "memory", "scheduler", "measure.detect", "tiny.build", "tiny.shapes",
          "scorers.clip", "scorers.openclip", "scorers.imagereward", "scorers.hpsv3", "scorers.lrm"}  # fmt: skip
"""Modules that may see diffusers and transformers, besides the recipes."""


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(f.read_text())
        for f in sorted(ROOT.rglob("*.py"))
    }


def imports(tree: ast.AST, *, top: bool = False) -> set[str]:
    """Imported modules; with `top` only those outside functions."""
    nodes = ast.walk(tree) if not top else _outside_functions(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _outside_functions(tree: ast.AST):
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _outside_functions(child)


def uses(found: set[str], package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in found)


def test_plain_modules_import_no_torch_and_only_each_other() -> None:
    plain = ground()
    for name, tree in modules().items():
        if name in plain:
            found = imports(tree)
            assert not any(uses(found, heavy) for heavy in ("torch", "diffusers", "transformers", "accelerate")), name
            ours = {m.removeprefix("drmcli.") for m in found if m.startswith("drmcli.")}
            assert all(any(m == p or m.startswith(p + ".") for p in (plain - {"__init__"}) | {"tiny"}) for m in ours), (
                name,
                ours,
            )


def test_flow_and_losses_import_torch_alone() -> None:
    for name in ("flow", "losses", "policy_loss"):
        found = imports(modules()[name])
        ours = {m for m in found if m.split(".")[0] == "drmcli"}
        assert all(m.split(".")[1] in ("flow", "losses") for m in ours if "." in m), name
        assert {m.split(".")[0] for m in found - ours} <= {
            "__future__",
            "collections",
            "dataclasses",
            "math",
            "torch",
        }, name


def test_only_models_and_recipes_see_diffusers() -> None:
    for name, tree in modules().items():
        found = imports(tree)
        if uses(found, "diffusers") or uses(found, "transformers"):
            assert name in MODELS or name.startswith(("recipes.", "families.")), name


def test_accelerate_is_seen_in_recipes_alone() -> None:
    for name, tree in modules().items():
        assert not uses(imports(tree), "accelerate") or name.startswith("recipes."), name


def test_typer_and_rich_are_seen_in_the_command_line_alone() -> None:
    for name, tree in modules().items():
        found = imports(tree)
        assert not (uses(found, "typer") or uses(found, "rich")) or name.startswith("cli."), name
        assert not uses(found, "click"), name


def test_the_command_line_imports_recipes_late() -> None:
    for name, tree in modules().items():
        if name.startswith("cli"):
            assert not uses(imports(tree, top=True), "drmcli.recipes"), name


def test_only_the_command_line_prints() -> None:
    for name, tree in modules().items():
        calls = [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"
        ]
        assert not calls or name.startswith("cli") or name == "tiny.build", name


def test_nothing_unpickles() -> None:
    for name, tree in modules().items():
        found = imports(tree)
        assert not uses(found, "pickle"), name
        assert "trust_remote_code" not in ast.dump(tree), name
        loads = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
        assert ast.unparse(tree).count("torch.load") == len(loads), name
        assert all("weights_only=True" in ast.unparse(n) for n in loads), name


def test_a_family_names_its_models_and_nobody_else_does() -> None:
    """A model or pipeline class of diffusers is imported in the file of its family alone; `tiny.build` makes the embedded one."""
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffusers":
                for alias in node.names:
                    model = alias.name.endswith(("Transformer2DModel", "UNet2DConditionModel")) or (
                        alias.name.endswith("Pipeline") and alias.name != "DiffusionPipeline"
                    )
                    assert not model or name.startswith("families.") or name == "tiny.build", (name, alias.name)


def test_families_import_nothing_above_flow() -> None:
    for name, tree in modules().items():
        if name.startswith("families"):
            ours = {m.removeprefix("drmcli.") for m in imports(tree) if m.startswith("drmcli.")}
            assert all(m.split(".")[0] in ("errors", "flow", "families") for m in ours), (name, ours)


def test_text_is_utf8_whatever_the_locale() -> None:
    """Every open, read_text and write_text names its encoding, but for files of bytes and the openers of other libraries."""
    names = {"open", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile"}
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            if called not in names or owner in (
                "Image",
                "tarfile",
                "zipfile",
                "webbrowser",
                "packed",
                "os",
                "cls",
                "self",
            ):
                continue
            if owner.endswith(("Studio", "PIL.Image")) or (
                called in ("read_text", "write_text") and not owner
            ):  # our own
                continue
            texts = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
            binary = any(isinstance(t, str) and "b" in t and len(t) <= 3 for t in texts)
            assert binary or any(k.arg == "encoding" for k in node.keywords), f"{name}: {ast.unparse(node)}"


def test_the_embedded_world_is_an_ordinary_user() -> None:
    """Names of datasets, prompt sets, detectors and scorers are looked up in tables: outside of tiny/ none is compared with "shapes"."""
    for name, tree in modules().items():
        found = [n for n in ast.walk(tree) if isinstance(n, ast.Compare) and "'shapes'" in ast.unparse(n)]
        assert not found or name.startswith("tiny"), (name, [ast.unparse(n) for n in found])


def test_files_classes_and_functions_fit_a_reader() -> None:
    """No file above 450 lines, no class above 250, no function above 80."""
    for name, tree in modules().items():
        lines = max((n.end_lineno or 0) for n in ast.walk(tree) if hasattr(n, "end_lineno")) if tree.body else 0
        assert lines <= 450, name
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                assert size <= (250 if isinstance(node, ast.ClassDef) else 80), (name, node.name, size)
