#!/usr/bin/env python3
"""Train the tiny base model that lorafleet ships, from text that CPython itself carries.

The corpus is CPython 3.11's standard library (sources, its tests, the ``pydoc`` topics). Which files, and their SHA-256
digests, are pinned in ``lorafleet/assets/tiny_base/corpus.json``; the split into training and held-out is by file.

    python scripts/train_tiny_base.py corpus      # (re)write the pinned list from this interpreter's library
    python scripts/train_tiny_base.py train       # tokenizer, training, evaluation, model card; resumes if interrupted
    python scripts/train_tiny_base.py evaluate    # held-out bits per byte of the shipped model
    python scripts/train_tiny_base.py sample      # a few continuations to look at

Training takes about an hour on two CPU cores with AMX; any other device only changes the time.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import re
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
ASSET = ROOT / "lorafleet" / "assets" / "tiny_base"
CORPUS_LIST = ASSET / "corpus.json"

HELD_OUT_ONE_IN = 25
# A file that gzip shrinks more than eightfold is a table (code pages, generated test vectors), not text.
MAX_GZIP_RATIO = 8.0
# Written by the build of one interpreter, with its paths: nobody else has the same bytes.
BUILD_SPECIFIC = re.compile(r"_sysconfigdata|(^|/)config-")
# Generated tables and data files: no language in them.
SKIP_PARTS = {"encodings", "__pycache__", "site-packages", "cjkencodings", "decimaltestdata"}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the corpus."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    context: int = 512
    batch_sequences: int = 16
    steps: int = 3600
    warmup_steps: int = 100
    # Share of the steps, at the end, over which the learning rate falls linearly to zero.
    decay_share: float = 0.45
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    weight_decay: float = 0.05
    seed: int = 20261122


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def pydoc_topics() -> str:
    """The language reference as ``pydoc`` shows it, one topic after another."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read_text(path: Path) -> str | None:
    """The file's text, or None where it is not UTF-8 or is a table rather than text."""
    raw = path.read_bytes()
    if len(raw) < 200:
        return None
    if len(raw) / len(gzip.compress(raw, 6)) > MAX_GZIP_RATIO:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_held_out(digest: str) -> bool:
    return int(digest[:8], 16) % HELD_OUT_ONE_IN == 0


def write_corpus_list() -> None:
    root = library_root()
    files: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIP_PARTS.intersection(path.relative_to(root).parts) or name == "pydoc_data/topics.py":
            continue
        if BUILD_SPECIFIC.search(name):
            continue
        text = read_text(path)
        if text is not None:
            files[name] = sha256(text)
    files["pydoc topics"] = sha256(pydoc_topics())
    python = ".".join(map(str, sys.version_info[:3]))
    CORPUS_LIST.write_text(json.dumps({"python": python, "held_out_one_in": HELD_OUT_ONE_IN, "files": files}, indent=0))
    held = sum(is_held_out(d) for d in files.values())
    print(f"{len(files)} files pinned from CPython {python}, {held} of them held out")


def load_corpus() -> tuple[list[str], list[str]]:
    """(training texts, held-out texts), every file checked against its pinned digest."""
    pinned = json.loads(CORPUS_LIST.read_text())
    root, train, held = library_root(), [], []
    for name, digest in pinned["files"].items():
        if name == "pydoc topics":
            text = pydoc_topics()
        else:
            path = root / name
            if not path.exists():
                raise SystemExit(
                    f"{name} is not in {root}: the corpus is pinned to CPython {pinned['python']} with its test suite. "
                    "Run this script with that version (python.org source builds and pyenv carry the tests)."
                )
            text = path.read_bytes().decode("utf-8")
        if sha256(text) != digest:
            raise SystemExit(
                f"{name} differs from the pinned corpus (CPython {pinned['python']}): found {sha256(text)[:12]}, "
                f"expected {digest[:12]}. Run this script with that version, or 'corpus' to pin your own."
            )
        (held if is_held_out(digest) else train).append(text)
    return train, held


def train_tokenizer(texts: list[str], recipe: Recipe):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Indentation of up to 16 spaces may become one token; digits stay single so that numbers are spelled.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer, texts: list[str]) -> Tensor:  # type: ignore[no-untyped-def]
    """All texts as one stream of ids ``[tokens]``, each opened by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer.backend_tokenizer.encode(text).ids)
    ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


def build_model(recipe: Recipe) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def token_losses(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Cross entropy in nats of ``ids[:, 1:]`` given what stands before, ``[batch, time - 1]``."""
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype is not torch.float32):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten().long(), reduction="none"
    ).view(ids.shape[0], -1)


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokenizer, texts: list[str], context: int, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    """Held-out bits per UTF-8 byte: each file by itself, windows of ``context`` tokens, half of each one fresh."""
    model.eval()
    nats, size, stride = 0.0, 0, context // 2
    windows: list[tuple[Tensor, int]] = []
    for text in texts:
        ids = encode(tokenizer, [text]).long()
        size += len(text.encode())
        start = 0
        while True:
            piece = ids[start : start + context + 1]
            windows.append((piece, 0 if start == 0 else context - stride))
            if start + context + 1 >= len(ids):
                break
            start += stride
    windows.sort(key=lambda w: len(w[0]))
    for i in range(0, len(windows), 16):
        group = windows[i : i + 16]
        length = max(len(piece) for piece, _ in group)
        ids = torch.full((len(group), length), tokenizer.pad_token_id, dtype=torch.long)
        keep = torch.zeros(len(group), length - 1, dtype=torch.bool)
        for row, (piece, skip) in enumerate(group):
            ids[row, : len(piece)] = piece
            keep[row, skip : len(piece) - 1] = True
        losses = token_losses(model, ids.to(device), torch.float32)
        nats += losses[keep.to(device)].double().sum().item()
    return nats / math.log(2) / size


def learning_rate_scale(step: int, recipe: Recipe) -> float:
    """Warm-up, plateau, linear decay to zero."""
    decay_steps = int(recipe.steps * recipe.decay_share)
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    return min(1.0, (recipe.steps - step) / decay_steps)


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the hidden matrices, AdamW for the embedding and the norms."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    hidden_ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in hidden_ids]
    return [
        torch.optim.Muon(hidden, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batch_at(step: int, stream: Tensor, recipe: Recipe) -> Tensor:
    """The batch of one step, ``[batch_sequences, context + 1]``: every epoch is a fresh shuffle at a fresh offset.

    A pure function of the step, so that a resumed run sees exactly what an undisturbed one would have seen.
    """
    per_epoch = (len(stream) - recipe.context - 1) // recipe.context
    steps_per_epoch = per_epoch // recipe.batch_sequences
    epoch, index = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(recipe.seed + epoch)
    offset = int(torch.randint(0, recipe.context, (1,), generator=generator))
    order = torch.randperm(per_epoch - 1, generator=generator)
    picked = order[index * recipe.batch_sequences : (index + 1) * recipe.batch_sequences]
    starts = picked * recipe.context + offset
    return torch.stack([stream[s : s + recipe.context + 1] for s in starts.tolist()]).long()


def save_atomically(obj: object, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(obj, part)
    part.replace(path)


def train(args: argparse.Namespace) -> None:
    recipe = Recipe(steps=args.steps)
    device = torch.device(args.device)
    torch.manual_seed(recipe.seed)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    train_texts, held_texts = load_corpus()
    tokenizer = train_tokenizer(train_texts, recipe)
    stream = encode(tokenizer, train_texts)
    size = sum(len(t.encode()) for t in train_texts)
    print(
        f"{size / 1e6:.1f} MB training text, {len(stream) / 1e6:.2f} M tokens, {size / len(stream):.2f} bytes a token"
    )

    model = build_model(recipe).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    opts = optimizers(model, recipe)
    base_lrs = [[g["lr"] for g in o.param_groups] for o in opts]

    def batch_loss(ids: Tensor) -> Tensor:
        return token_losses(model, ids, torch.bfloat16).mean()

    # Compiled whole: the loss over 4096 classes is a quarter of a step when it is not fused with its backward.
    if args.compile:
        batch_loss = torch.compile(batch_loss)
    checkpoint, first = work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise SystemExit(f"{checkpoint} belongs to another recipe; remove it or pass another --work")
        model.load_state_dict(state["model"])
        for opt, opt_state in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(opt_state)
        first = state["step"]
        print(f"resuming at step {first}")

    def save_checkpoint(step: int) -> None:
        save_atomically(
            {
                "step": step,
                "recipe": asdict(recipe),
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in opts],
            },
            checkpoint,
        )

    running, since = 0.0, time.monotonic()
    for step in range(first, recipe.steps):
        scale = learning_rate_scale(step, recipe)
        for opt, lrs in zip(opts, base_lrs, strict=True):
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = lr * scale
        model.train()
        loss = batch_loss(batch_at(step, stream, recipe).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        running += loss.item()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - since
            rate = 50 * recipe.batch_sequences * recipe.context / seconds
            print(f"step {step + 1}/{recipe.steps} loss {running / 50:.4f} {rate / 1e3:.1f} k tokens/s", flush=True)
            running, since = 0.0, time.monotonic()
        if (step + 1) % 500 == 0:
            save_checkpoint(step + 1)
            quick = bits_per_byte(model, tokenizer, held_texts[:8], recipe.context, device)
            print(f"step {step + 1} held-out (8 files) {quick:.4f} bits/byte", flush=True)
            since = time.monotonic()

    out = Path(args.out)
    export(model, tokenizer, out)
    report_card(out, recipe, train_texts, held_texts, len(stream), running_loss=loss.item(), device=device)


def export(model: nn.Module, tokenizer, out: Path) -> None:  # type: ignore[no-untyped-def]
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def load_shipped(path: Path, device: torch.device):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path)


def gzip_bits_per_byte(texts: list[str]) -> float:
    raw = [t.encode() for t in texts]
    return 8 * sum(len(gzip.compress(r, 9)) for r in raw) / sum(map(len, raw))


def report_card(
    out: Path,
    recipe: Recipe,
    train_texts: list[str],
    held_texts: list[str],
    tokens: int,
    *,
    running_loss: float,
    device: torch.device,
) -> None:
    model, tokenizer = load_shipped(out, device)
    held_bpb = bits_per_byte(model, tokenizer, held_texts, recipe.context, device)
    gzip_bpb = gzip_bits_per_byte(held_texts)
    parameters = sum(p.numel() for p in model.parameters())
    python = json.loads(CORPUS_LIST.read_text())["python"]
    seen = recipe.steps * recipe.batch_sequences * recipe.context
    train_bytes = sum(len(t.encode()) for t in train_texts)
    (out / "README.md").write_text(
        f"""---
license: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# lorafleet tiny base

A small but really trained causal language model, so that the whole of lorafleet can be run, tested and judged
without a download. Llama architecture, {parameters / 1e6:.2f} M parameters, byte-level BPE of {recipe.vocab_size}
tokens, context {recipe.context} tokens, bfloat16 weights.

| | |
|---|---|
| data | CPython {python} standard library with its tests, and the `pydoc` topics; files and digests in `corpus.json` |
| training text | {train_bytes / 1e6:.1f} MB in {len(train_texts)} files, {tokens / 1e6:.2f} M tokens |
| held out, by file | {sum(len(t.encode()) for t in held_texts) / 1e6:.2f} MB in {len(held_texts)} files |
| steps | {recipe.steps} of {recipe.batch_sequences} × {recipe.context} tokens ({seen / 1e6:.0f} M tokens seen) |
| optimiser | Muon (lr {recipe.muon_lr}) for the hidden matrices, AdamW (lr {recipe.adam_lr}) for the rest |
| schedule | {recipe.warmup_steps} steps of warm-up, constant, linear decay over the last {recipe.decay_share:.0%} |
| held-out loss | **{held_bpb:.3f} bits per byte** (`gzip -9`, file by file: {gzip_bpb:.3f}) |
| last training batch | {running_loss:.3f} nats per token |
| recipe | `python scripts/train_tiny_base.py train` (seed {recipe.seed}) |

Held-out loss: each file by itself, windows of {recipe.context} tokens that overlap by half, scored on the fresh half.

**Licence.** The training text is under the PSF License 2.0, and so are these weights.
**Use.** Demonstrations, tests and benchmarks of lorafleet. It knows Python's own sources and documentation, and nothing
of the world.
"""
    )
    (out / "training.json").write_text(
        json.dumps(
            {
                "recipe": asdict(recipe),
                "parameters": parameters,
                "held_out_bits_per_byte": held_bpb,
                "gzip_bits_per_byte": gzip_bpb,
                "python": python,
                "torch": torch.__version__,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"held-out {held_bpb:.4f} bits/byte (gzip -9: {gzip_bpb:.4f})")


def sample(args: argparse.Namespace) -> None:
    model, tokenizer = load_shipped(Path(args.out), torch.device("cpu"))
    for prompt in (
        "def read_lines(path):\n",
        'class Queue:\n    """',
        'The "for" statement is used to',
        "import os\nimport sys\n",
    ):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt).input_ids]])
        torch.manual_seed(0)
        done = model.generate(ids, max_new_tokens=120, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=0)
        print("-" * 80 + "\n" + tokenizer.decode(done[0, 1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["corpus", "train", "evaluate", "sample"])
    parser.add_argument("--out", default=str(ASSET), help="where the model goes, in HF format")
    parser.add_argument("--work", default=str(ROOT / "build" / "tiny_base"), help="checkpoints")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the model"
    )
    args = parser.parse_args()
    if args.command == "corpus":
        write_corpus_list()
    elif args.command == "train":
        train(args)
    elif args.command == "sample":
        sample(args)
    else:
        model, tokenizer = load_shipped(Path(args.out), torch.device(args.device))
        _, held = load_corpus()
        context = Recipe.context
        print(f"held-out {bits_per_byte(model, tokenizer, held, context, torch.device(args.device)):.4f} bits/byte")
        print(f"gzip -9  {gzip_bits_per_byte(held):.4f} bits/byte")


if __name__ == "__main__":
    main()
