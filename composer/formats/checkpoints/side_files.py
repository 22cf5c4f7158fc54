"""The files beside a checkpoint's weights, chosen by what a model needs. Other files in the directory are ignored.

The base's directory may hold an adapter, a trainer's state or logs. Beside a merged model an `adapter_config.json`
makes transformers apply that adapter.
"""

from fnmatch import fnmatchcase
from pathlib import Path

NEEDED = {
    "the tokenizer": (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json",
        "vocab*.txt", "vocab.bpe", "merges.txt", "bpe.codes", "tokenizer.model*", "*.model", "*.spm", "*.tiktoken",
        "tekken.json", "normalizer.json", "emoji.json",
    ),
    "the chat template": ("chat_template.jinja", "chat_template.json"),
    "generation": ("generation_config.json",),
    "images, sound and video": (
        "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
        "video_preprocessor_config.json", "feature_extractor_config.json",
    ),
    "code of its own": ("*.py",),
    "modules of sentence-transformers": (
        "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    ),
    "its licence": (
        "licen[cs]e*", "notice*", "copying*", "copyright*", "third_party*", "use_policy*",
    ),
}  # fmt: skip
"""Names, and patterns of names in lower case, by purpose."""
_SIDE_FILE_BYTES = 64 << 20  # the largest tokenizers have about 35 MB
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt")


def side_files(source: Path) -> list[str]:
    """The files of a checkpoint besides its weights that NEEDED has; the caller writes config, index and card, since
    a base's card describes another model. Only regular files at the top of the directory, of at most 64 MiB."""
    files = [file for file in sorted(source.iterdir()) if file.is_file()]
    return [file.name for file in files if is_side_file(file.name, file.stat().st_size)]


def is_side_file(name: str, size_bytes: int) -> bool:
    """Whether a regular file at the top of a checkpoint is one of these."""
    lower = name.lower()
    needed = any(fnmatchcase(lower, pattern) for patterns in NEEDED.values() for pattern in patterns)
    return needed and not lower.endswith(_WEIGHTS) and size_bytes <= _SIDE_FILE_BYTES
