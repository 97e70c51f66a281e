"""Other scorers: each architecture, tiny and with random weights in its published layout, against a computation of its own."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from drmcli.errors import InputError, MissingError, RunError
from drmcli.scorers import NAMES, Scorer, load_scorer
from drmcli.scorers.pictures import MEAN, STD, cropped, padded
from drmcli.tiny import world
from drmcli.tiny.judge import judge

PROMPTS = [
    "a large red circle",
    "a small blue square on the left",
    "a large red circle",
    "a green triangle on the large blue " * 6,
]
"""One twice, one longer than every tiny encoder reads."""


def load(ref: str, **options: object) -> Scorer:
    return load_scorer(ref, device=torch.device("cpu"), dtype=torch.float32, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Wide, tall, square and small, of smooth noise."""
    rng = np.random.default_rng(3)
    sizes = [(64, 40), (40, 53), (48, 48), (20, 28)]
    small = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, sizes)]


def random_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight drawn anew and large enough that each of them matters."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            about = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            tensor.copy_(about + torch.randn(tensor.shape, generator=rng) * (0.2 if tensor.ndim < 2 else 0.15))
    return module.eval()


def independent(scorer: Scorer, images: list[Image.Image]) -> None:
    """A score does not depend on what else is in the batch, nor on its place there."""
    together = scorer.score_images(images, PROMPTS)
    assert together.shape == (len(images),)
    assert together.dtype == torch.float32
    assert together.std() > 1e-4
    alone = torch.cat([scorer.score_images([image], [prompt]) for image, prompt in zip(images, PROMPTS)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scorer.score_images(images[::-1], PROMPTS[::-1]).flip(0), together, rtol=1e-4, atol=1e-5)
    assert scorer.score_images([], []).shape == (0,)


def coarsely(ref: str, images: list[Image.Image], exact: Tensor, prompts: list[str] = PROMPTS) -> None:
    """In bfloat16 about the same score, still float32 out: within a tenth of what the scores range over, or of themselves."""
    scores = load_scorer(ref, device=torch.device("cpu"), dtype=torch.bfloat16).score_images(images, prompts)
    assert scores.dtype == torch.float32
    assert 0 < (exact - scores).abs().max() < 0.1 * max(float(exact.max() - exact.min()), float(exact.abs().max()))


# --- pictures


def test_cropped_is_what_transformers_does(images: list[Image.Image]) -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    torch.testing.assert_close(
        cropped(images, 28), processor(images, return_tensors="pt").pixel_values, atol=2e-6, rtol=0
    )


def test_the_middle_is_rounded_two_ways() -> None:
    """7 x 4 pixels cut to 4 x 4: a rest of 3 starts at 1 rounded down, and at round(1.5) = 2 as torchvision has it."""
    ramp = Image.fromarray(np.tile(np.arange(7, dtype=np.uint8)[None, :, None] * 30, (4, 1, 3)))
    red = [(cropped([ramp], 4, nearest=way)[0, 0, 0] * STD[0] + MEAN[0]) * 255 / 30 for way in (False, True)]
    torch.testing.assert_close(red[0], torch.tensor([1.0, 2, 3, 4]))
    torch.testing.assert_close(red[1], torch.tensor([2.0, 3, 4, 5]))


def test_padded_has_black_bars() -> None:
    """A white picture twice as wide as high: half of the rows are white, a quarter above and below black."""
    pixels = padded([Image.new("RGB", (40, 20), "white")], 8)
    rows = pixels[0, :, :, 4] * torch.tensor(STD)[:, None] + torch.tensor(MEAN)[:, None]
    torch.testing.assert_close(rows, torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0]).expand(3, 8), atol=1e-5, rtol=0)


# --- CLIP and PickScore: transformers' own layout


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, generator_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(generator_folder / "tokenizer")
    tokenizer.save_pretrained(folder)
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": 16, "num_attention_heads": 2,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    vision = {"image_size": 28, "patch_size": 14, "num_attention_heads": 4}
    both = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "projection_dim": 24}
    config = CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=24)
    random_(CLIPModel(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["pickscore", "clip"])
def test_pickscore_and_clip(name: str, clip_folder: Path, images: list[Image.Image], capfd) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    words = tokenizer(PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        want = model(**words, **processor(images, return_tensors="pt")).logits_per_image.diag()
    capfd.readouterr()
    scorer = load(f"{name}={clip_folder}")
    assert scorer.name == name
    torch.testing.assert_close(scorer.score_images(images, PROMPTS), want, rtol=1e-4, atol=1e-4)
    independent(scorer, images)
    coarsely(f"{name}={clip_folder}", images, want)
    assert capfd.readouterr() == ("", "")


def test_each_prompt_is_encoded_once(clip_folder: Path, images: list[Image.Image], monkeypatch) -> None:
    scorer = load(f"pickscore={clip_folder}")
    seen: list[list[str]] = []
    call = CLIPTokenizer.__call__
    monkeypatch.setattr(CLIPTokenizer, "__call__", lambda self, text, **k: seen.append(text) or call(self, text, **k))
    scorer.score_images(images, PROMPTS)
    assert seen == [[PROMPTS[0], PROMPTS[1], PROMPTS[3]]]


# --- HPSv2: open_clip's layout, from modules of its shape


class Block(nn.Module):
    """open_clip's residual block; torch's own attention has the fused in_proj_weight."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        mlp = {"c_fc": nn.Linear(width, 3 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(3 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(mlp))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


def tower(width: int, heads: int, layers: int) -> nn.Module:
    module = nn.Module()
    module.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
    return module


class OpenClip(nn.Module):
    """A ViT-H-14 of 160 and 128 features: 2 heads of 80, 2 heads of 64."""

    def __init__(self, vocab: int):
        super().__init__()
        self.visual = nn.Module()
        self.visual.class_embedding = nn.Parameter(torch.zeros(160))
        self.visual.positional_embedding = nn.Parameter(torch.zeros(5, 160))
        self.visual.proj = nn.Parameter(torch.zeros(160, 24))
        self.visual.conv1 = nn.Conv2d(3, 160, 14, 14, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(160), nn.LayerNorm(160)
        self.visual.transformer = tower(160, 2, 2)
        self.token_embedding = nn.Embedding(vocab, 128)
        self.positional_embedding = nn.Parameter(torch.zeros(16, 128))
        self.text_projection = nn.Parameter(torch.zeros(128, 24))
        self.transformer = tower(128, 2, 1)
        self.ln_final = nn.LayerNorm(128)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def image(self, x: Tensor) -> Tensor:
        x = self.visual.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        x = self.visual.ln_pre(x)
        for block in self.visual.transformer.resblocks:
            x = block(x)
        return F.normalize(self.visual.ln_post(x[:, 0]) @ self.visual.proj, dim=-1)

    def text(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((16, 16), float("-inf")).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        x = self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]
        return F.normalize(x @ self.text_projection, dim=-1)


@pytest.fixture
def hps(tmp_path: Path, generator_folder: Path) -> tuple[Path, OpenClip, CLIPTokenizer]:
    tokenizer = CLIPTokenizer.from_pretrained(generator_folder / "tokenizer")
    model = random_(OpenClip(len(tokenizer)))
    folder = tmp_path / "HPSv2"
    folder.mkdir()
    tokenizer.save_pretrained(folder / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    for version in ("2", "2.1"):
        state = {"epoch": 1, "state_dict": model.state_dict()}
        torch.save(state, folder / f"HPS_v{version}_compressed.pt")
    return folder, model, tokenizer


def test_hpsv2(hps: tuple, images: list[Image.Image]) -> None:
    folder, model, tokenizer = hps
    rows = []
    for text in PROMPTS:  # start, words, end, zeros; a long prompt keeps its end mark
        words = tokenizer(text, add_special_tokens=False).input_ids[:14]
        row = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
        rows.append(row + [0] * (16 - len(row)))
    with torch.no_grad():
        want = (model.image(padded(images, 28)) * model.text(torch.tensor(rows))).sum(-1)
    scorer = load(f"hpsv2={folder}")
    torch.testing.assert_close(scorer.score_images(images, PROMPTS), want, rtol=1e-4, atol=1e-5)
    independent(scorer, images)
    coarsely(f"hpsv2={folder}", images, want)
    torch.testing.assert_close(load(f"hpsv2.1={folder}").score_images(images, PROMPTS), want, rtol=1e-4, atol=1e-5)


def test_safetensors_are_preferred(hps: tuple, images: list[Image.Image]) -> None:
    folder, model, _ = hps
    before = load(f"hpsv2={folder}").score_images(images, PROMPTS)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "HPS_v2_compressed.safetensors")
    (folder / "HPS_v2_compressed.pt").write_text("not read")
    torch.testing.assert_close(load(f"hpsv2={folder}").score_images(images, PROMPTS), before)


# --- aesthetic


def test_aesthetic(tmp_path: Path, clip_folder: Path, images: list[Image.Image]) -> None:
    """The published file names its linear layers 0, 2, 4, 6, 7: dropouts lie between, activations do not."""
    folder = tmp_path / "aesthetic"
    shutil.copytree(clip_folder, folder / "clip-vit-large-patch14")
    linear = nn.Linear
    layers = [
        linear(24, 10),
        nn.Dropout(),
        linear(10, 8),
        nn.Dropout(),
        linear(8, 6),
        nn.Dropout(),
        linear(6, 4),
        linear(4, 1),
    ]
    mlp = random_(nn.Sequential(*layers))
    torch.save({f"layers.{k}": v for k, v in mlp.state_dict().items()}, folder / "sac+logos+ava1-l14-linearMSE.pth")
    clip = CLIPVisionModelWithProjection.from_pretrained(clip_folder)
    with torch.no_grad():
        vectors = clip(pixel_values=cropped(images, 28, nearest=True)).image_embeds
        want = mlp(vectors / vectors.norm(dim=-1, keepdim=True))[:, 0]
    scorer = load(f"aesthetic={folder}")
    torch.testing.assert_close(scorer.score_images(images, PROMPTS), want, rtol=1e-4, atol=1e-5)
    independent(scorer, images)
    coarsely(f"aesthetic={folder}", images, want)
    torch.testing.assert_close(scorer.score_images(images, PROMPTS), scorer.score_images(images, PROMPTS[::-1]))
    torch.save({"layers.0.weight": torch.zeros(1, 25), "layers.0.bias": torch.zeros(1)}, next(folder.glob("*.pth")))
    assert "layer 0 is [1, 25], and 24 features come in" in refusal(f"aesthetic={folder}", InputError)[0]


# --- ImageReward: BLIP's layout


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, keep: Tensor | None = None) -> Tensor:
    """Multi-head attention [B, L, D]; `keep` [B, L of keys] says which keys count."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class BlipInPlainTorch:
    """The vision transformer and the text encoder as functions of a published state dict; 2 heads each, norms 1e-6 and 1e-12."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def look(self, pixels: Tensor) -> Tensor:
        at = "blip.visual_encoder"
        x = F.conv2d(
            pixels, self.state[f"{at}.patch_embed.proj.weight"], self.state[f"{at}.patch_embed.proj.bias"], stride=16
        )
        x = torch.cat([self.state[f"{at}.cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + self.state[f"{at}.pos_embed"]
        for i in range(2):
            block = f"{at}.blocks.{i}"
            qkv = self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
            x = x + self.linear(attend(*qkv, heads=2), f"{block}.attn.proj")
            hidden = F.gelu(self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            x = x + self.linear(hidden, f"{block}.mlp.fc2")
        return self.norm(x, f"{at}.norm", 1e-6)

    def read(self, ids: Tensor, keep: Tensor, seen: Tensor) -> Tensor:
        at = "blip.text_encoder"
        x = self.state[f"{at}.embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{at}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(x, f"{at}.embeddings.LayerNorm", 1e-12)
        for i in range(2):
            layer = f"{at}.encoder.layer.{i}"
            for kind, other, mask in (("attention", None, keep), ("crossattention", seen, None)):
                source = x if other is None else other
                q = self.linear(x, f"{layer}.{kind}.self.query")
                k, v = (self.linear(source, f"{layer}.{kind}.self.{part}") for part in ("key", "value"))
                y = self.linear(attend(q, k, v, 2, mask), f"{layer}.{kind}.output.dense")
                x = self.norm(x + y, f"{layer}.{kind}.output.LayerNorm", 1e-12)
            y = self.linear(F.gelu(self.linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
            x = self.norm(x + y, f"{layer}.output.LayerNorm", 1e-12)
        return x[:, 0]


def blip_state() -> dict[str, Tensor]:
    """Random weights in the layout of ImageReward.pt: vision 128 wide, text 32 wide, 2 layers each."""
    rng = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}

    def layer(name: str, out: int, into: int = 0) -> None:
        """A linear layer, or a norm where nothing comes in."""
        base = torch.ones(out) if not into else torch.zeros(out, into)
        state[f"{name}.weight"] = base + 0.2 * torch.randn(base.shape, generator=rng)
        state[f"{name}.bias"] = 0.2 * torch.randn(out, generator=rng)

    at = "blip.visual_encoder"
    for name, shape in {
        "cls_token": (1, 1, 128),
        "pos_embed": (1, 5, 128),
        "patch_embed.proj.weight": (128, 3, 16, 16),
    }.items():
        state[f"{at}.{name}"] = 0.1 * torch.randn(shape, generator=rng)
    state[f"{at}.patch_embed.proj.bias"] = torch.zeros(128)
    layer(f"{at}.norm", 128)
    for i in range(2):
        for name, out, into in (("norm1", 128, 0), ("norm2", 128, 0), ("attn.qkv", 384, 128), ("attn.proj", 128, 128)):
            layer(f"{at}.blocks.{i}.{name}", out, into)
        layer(f"{at}.blocks.{i}.mlp.fc1", 96, 128)
        layer(f"{at}.blocks.{i}.mlp.fc2", 128, 96)
    at = "blip.text_encoder"
    state[f"{at}.embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{at}.embeddings.word_embeddings.weight"] = torch.randn(20, 32, generator=rng)
    state[f"{at}.embeddings.position_embeddings.weight"] = torch.randn(40, 32, generator=rng)
    layer(f"{at}.embeddings.LayerNorm", 32)
    for i in range(2):
        for kind, into in (("attention", 32), ("crossattention", 128)):
            block = f"{at}.encoder.layer.{i}.{kind}"
            layer(f"{block}.self.query", 32, 32)
            layer(f"{block}.self.key", 32, into)
            layer(f"{block}.self.value", 32, into)
            layer(f"{block}.output.dense", 32, 32)
            layer(f"{block}.output.LayerNorm", 32)
        layer(f"{at}.encoder.layer.{i}.intermediate.dense", 64, 32)
        layer(f"{at}.encoder.layer.{i}.output.dense", 32, 64)
        layer(f"{at}.encoder.layer.{i}.output.LayerNorm", 32)
    layer("blip.vision_proj", 16, 128)
    layer("blip.text_proj", 16, 32)
    for number, (out, into) in {0: (12, 32), 2: (8, 12), 4: (6, 8), 6: (4, 6), 7: (1, 4)}.items():
        layer(f"mlp.layers.{number}", out, into)
    return state


def test_imagereward(tmp_path: Path, images: list[Image.Image]) -> None:
    folder, state = tmp_path / "ImageReward", blip_state()
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "large",
        "small",
        "red",
        "blue",
        "green",
        "circle",
        "square",
        "on",
    ]
    (folder / "bert-base-uncased").mkdir(parents=True)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder / "bert-base-uncased")
    torch.save(state, folder / "ImageReward.pt")
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "encoder_width": 768,
        "vocab_size": 20, "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0,
        "type_vocab_size": 2, "add_cross_attention": True, "model_type": "bert",
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(sizes))

    rows = []
    for text in PROMPTS:
        known = [words.index(word) if word in words else 1 for word in text.split()][:33]
        rows.append([2, *known, 3] + [0] * (33 - len(known)))
    ids, blip = torch.tensor(rows), BlipInPlainTorch(state)
    assert ids.shape[1] == 35
    x = blip.read(ids, ids != 0, blip.look(cropped(images, 32, nearest=True)))
    for number in (0, 2, 4, 6, 7):
        x = blip.linear(x, f"mlp.layers.{number}")
    want = (x[:, 0] - 0.16717362830052426) / 1.0333394966054072

    scorer = load(f"imagereward={folder}")
    torch.testing.assert_close(scorer.score_images(images, PROMPTS), want, rtol=1e-5, atol=1e-5)
    independent(scorer, images)
    coarsely(f"imagereward={folder}", images, want)
    swapped = scorer.score_images(images, [PROMPTS[1], *PROMPTS[1:]])
    assert swapped[0] != want[0]


# --- HPSv3: Qwen2-VL and a head


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, nn.Module]:
    """The base's config and tokenizer beside weights of the model with a row for the added token, and of the head."""
    folder = tmp_path_factory.mktemp("hpsv3")
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]  # byte-level
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = Qwen2Tokenizer(vocab={t: i for i, t in enumerate([*letters, *marks])}, merges=[])
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.save_pretrained(folder)
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 400, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids(marks[-1])
    ).save_pretrained(folder)
    config = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer) + 1
    model = random_(Qwen2VLForConditionalGeneration(config))
    head = random_(
        nn.Sequential(nn.Linear(32, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2))
    )
    return folder, model, head


def hpsv3_state(model: nn.Module, head: nn.Module, *, old: bool) -> dict[str, Tensor]:
    """The published names, or those of releases before 4.52, where `model.` was the text tower."""
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if old:
        state = {
            k.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v
            for k, v in state.items()
        }
    return state | {f"rm_head.{k}": v for k, v in head.state_dict().items()}


def hpsv3_by_hand(folder: Path, model: nn.Module, head: nn.Module, image: Image.Image, prompt: str) -> Tensor:
    """The reference's whole text, END and the answer's opening included, through transformers' own processor and model."""
    from drmcli.scorers.hpsv3 import INSTRUCTION

    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    area = 256 * 8 * 8
    processor = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": area, "longest_edge": area})
    seen = processor(image, return_tensors="pt")
    tokens = int(seen.image_grid_thw.prod()) // 4
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * tokens
        + INSTRUCTION.replace("{prompt}", prompt)
        + "\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        hidden = model.model(input_ids=ids, position_ids=positions, **seen).last_hidden_state
    return head(hidden[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")])[0, 0].detach()


@pytest.mark.parametrize("old", [False, True])
def test_hpsv3(qwen: tuple, images: list[Image.Image], old: bool) -> None:
    folder, model, head = qwen
    save_file(hpsv3_state(model, head, old=old), folder / "HPSv3.safetensors")
    scorer = load(f"hpsv3={folder}")
    two, asked = [images[0].resize((150, 139)), images[1]], ["a {red} circle", "a circle"]  # too large, too small
    want = torch.stack([hpsv3_by_hand(folder, model, head, image, text) for image, text in zip(two, asked)])
    torch.testing.assert_close(scorer.score_images(two, asked), want, rtol=1e-4, atol=1e-4)
    if not old:
        independent(scorer, images)
        coarsely(f"hpsv3={folder}", two, want, asked)


def test_hpsv3_text_begins_and_ends_as_published() -> None:
    from drmcli.scorers.hpsv3 import INSTRUCTION

    text = INSTRUCTION.format(prompt="PROMPT").removeprefix("<|vision_end|>")
    assert text.startswith(
        "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give"
    )
    assert text.endswith(
        "\nTextual prompt - PROMPT\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>"
    )
    assert text.count("\n- **") == 10
    assert text.count(":**  \n") == 2


# --- without weights


def test_shapes_is_the_judge() -> None:
    captions = list(world.captions("val"))[:3]
    pixels = world.draw(captions, np.random.default_rng(0), flawed=0.5)
    scorer = load("shapes")
    want = torch.from_numpy(judge(pixels, captions).score).float()
    torch.testing.assert_close(scorer.score_images([Image.fromarray(p) for p in pixels], captions), want)
    large = [Image.fromarray(p).resize((64, 64), Image.Resampling.NEAREST) for p in pixels]
    torch.testing.assert_close(scorer.score_images(large, captions), want)


CALLABLES = """
import torch
def width(images, prompts):
    return [image.width + len(prompt) for image, prompt in zip(images, prompts)]
def column(images, prompts):
    return torch.zeros(len(images), 1)
def broken(images, prompts):
    return [float("nan")] * len(images)
def words(images, prompts):
    return prompts
number = 3
"""


def test_callable(tmp_path: Path, images: list[Image.Image]) -> None:
    (tmp_path / "my_scores.py").write_text(CALLABLES)
    scorer = load("my_scores:width")
    assert scorer.name == "my_scores:width"
    independent(scorer, images)
    assert scorer.score_images(images[:1], ["abc"]).tolist() == [67.0]
    for name, fact in (("column", "scores for 4 pictures"), ("broken", "not finite"), ("words", "not numbers")):
        with pytest.raises(RunError, match=fact):
            load(f"my_scores:{name}").score_images(images, PROMPTS)
    for ref, fact in (
        ("my_scores:nothing", "no callable 'nothing'"),
        ("my_scores:number", "no callable 'number'"),
        ("no_such_module:score", "there is no module no_such_module"),
    ):
        with pytest.raises(InputError, match=fact) as caught:
            load(ref, flag="--add-reward")
        assert caught.value.message.startswith(f"--add-reward {ref}: ")


# --- errors


def refusal(ref: str, kind: type, **options: object) -> tuple[str, str]:
    with pytest.raises(kind) as caught:
        load(ref, **options)
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value.message, caught.value.hint


def test_unknown_names() -> None:
    message, hint = refusal("pickscor", InputError)
    assert message == "--scorer pickscor: there is no such scorer"
    assert "did you mean pickscore" in hint
    assert "known are pickscore, clip" in refusal("zzz", InputError)[1]
    refusal("shapes=folder", InputError)
    refusal("pickscore=", InputError)


WITH_WEIGHTS = [name for name in NAMES if name != "shapes"]


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_missing_weights(name: str, tmp_path: Path) -> None:
    message, hint = refusal(f"{name}={tmp_path / 'nowhere'}", MissingError, flag="--reward")
    assert message == f"--reward {name}={tmp_path / 'nowhere'}: there is no such folder"
    assert f"--reward {name}=FOLDER" in hint
    message, hint = refusal(f"{name}={tmp_path}", MissingError)
    assert "the folder holds no" in message
    assert "https://huggingface.co/" in hint


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_hub_out_of_reach(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message, hint = refusal(name, MissingError)
    assert message.startswith(f"--scorer {name}: not in the local cache")
    assert f"--scorer {name}=FOLDER" in hint


def test_companion_out_of_reach(hps: tuple) -> None:
    """The tokenizer is not in the folder, and the hub is not there: the hint says where to put it."""
    folder, *_ = hps
    shutil.rmtree(folder / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    message, hint = refusal(f"hpsv2={folder}", MissingError)
    assert "hub cannot be reached" in message
    assert hint == f"connect once to download laion/CLIP-ViT-H-14-laion2B-s32B-b79K, or put it into {folder}"


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda s: s.pop("visual.proj"), "lack visual.proj"),
        (
            lambda s: s.pop("transformer.resblocks.0.attn.in_proj_bias"),
            "lack transformer.resblocks.0.attn.in_proj_bias",
        ),
        (lambda s: s.update(bogus=torch.zeros(2)), "hold bogus"),
        (lambda s: s.update({"ln_final.weight": torch.zeros(7)}), "ln_final|final_layer_norm"),
    ],
)
def test_weights_of_another_kind(hps: tuple, change: Callable, fact: str) -> None:
    folder, model, _ = hps
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    change(state)
    save_file(state, folder / "HPS_v2_compressed.safetensors")
    message, hint = refusal(f"hpsv2={folder}", InputError)
    assert message.startswith(f"--scorer hpsv2={folder}: ")
    with pytest.raises(InputError, match=fact):
        load(f"hpsv2={folder}")
    assert "hpsv2" in hint


def test_a_transformers_folder_that_lacks_weights(tmp_path: Path, clip_folder: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(clip_folder, folder)
    state = {
        k: v for k, v in CLIPModel.from_pretrained(clip_folder).state_dict().items() if k != "text_projection.weight"
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "text_projection.weight" in refusal(f"pickscore={folder}", InputError)[0]


class Evil:
    """Unpickling it would call a function."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("unpickled"),))


def test_a_pickle_is_not_run(hps: tuple) -> None:
    folder, *_ = hps
    torch.save({"state_dict": Evil()}, folder / "HPS_v2_compressed.pt")
    message, hint = refusal(f"hpsv2={folder}", InputError)
    assert "more than tensors" in message
    assert "safetensors" in hint
    assert not Path("unpickled").exists()
    for content in (b"", b"damaged"):
        (folder / "HPS_v2_compressed.pt").write_bytes(content)
        refusal(f"hpsv2={folder}", InputError)
    torch.save([1, 2], folder / "HPS_v2_compressed.pt")
    assert "no state dict" in refusal(f"hpsv2={folder}", InputError)[0]


def test_names_are_listed_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys; from drmcli.scorers import NAMES; assert 'hpsv3' in NAMES; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
