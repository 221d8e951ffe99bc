"""Encoders by name: refused before their library loads, then loaded without a classifier."""

from __future__ import annotations

import os
import re
import runpy
import socket
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from fam_plugins.core.messages import unknown_name

__all__ = ["check_model", "load_encoder"]

LIBRARIES = {  # module, where it says what models there are, what ends the name of one
    "torchvision": ("torchvision", "models/*.py", ":"),
    "timm": ("timm", "models/*.py", "."),
    "hf": ("transformers", "", ":"),
    "open_clip": ("open_clip", "model_configs/*.json", "/"),
}


def check_model(spec: str, weights: str) -> None:
    """Raise ImportError, OSError or ValueError if a model or its weights cannot be had."""
    (kind, _, name), script = spec.partition(":"), spec.rpartition(":")[0]
    for file in [weights] * (weights not in ("default", "none")) + [script] * (".py:" in spec):
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file!r}")
    if ".py:" in spec:
        return
    if kind not in LIBRARIES or not name:
        known = ", ".join(f"{one}:NAME" for one in LIBRARIES)
        raise ValueError(f"unknown model {spec!r}: write {known} or file.py:FUNCTION")
    module, where, end = LIBRARIES[kind]
    if (found := find_spec(module)) is None:
        extra = module.replace("_", "-")
        raise ImportError(f"{module} is not installed: pip install 'fam-plugins[{extra}]'")
    stem, home = name.partition(end)[0], Path(str(found.origin)).parent
    files = [*home.glob(where)] if where else []
    entry = re.compile(r"^@register_model\b.*?^def (\w+)\(", re.S | re.M)
    names = [one for file in files for one in entry.findall(file.read_text("utf-8"))]
    names = sorted(names or [file.stem for file in files])
    if names and stem not in names:
        raise ValueError(unknown_name(f"{kind} model", stem, names))
    if Path(name).is_dir() if kind == "hf" else weights != "default":
        return
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    kept = "*/snapshots/*/*model*"
    cache = os.environ.get("HF_HOME", f"{user}/huggingface")
    cache = os.environ.get("HF_HUB_CACHE", f"{cache}/hub")
    if kind == "torchvision":
        host, kept = "https://download.pytorch.org", "hub/checkpoints/*"
        cache = os.environ.get("TORCH_HOME", f"{user}/torch")
    url = urlsplit(host)
    try:
        if not getproxies():  # behind a proxy only the library can tell
            socket.create_connection((url.hostname, url.port or 443), timeout=1).close()
    except OSError as error:
        wanted = "openclip" if kind == "open_clip" else _plain(stem)
        downloads = Path(cache).expanduser().glob(kept)
        if not any(wanted in _plain(str(file)) for file in downloads):
            fix = "pass --weights FILE (or none)" if where else "check the name, or pass hf:FOLDER"
            problem = f"cannot reach {url.hostname}, and {name} was not downloaded before"
            raise ConnectionError(f"{problem}: connect once, or {fix}") from error
        os.environ["HF_HUB_OFFLINE"] = "1"  # or the hub would try for a minute


def _plain(name: str) -> str:
    # Names of models and of their files differ in dots, lines and capitals.
    return re.sub(r"[^a-z0-9]", "", name.lower())


def load_encoder(
    spec: str, weights: str, mean: Any = None, std: Any = None, size: int | None = None
) -> tuple[Any, Any]:
    """An encoder in eval mode, without its classifier, and its transform.

    Any of ``mean``, ``std`` and ``size`` replaces the transform, the rest being ImageNet's.
    ValueError if the weights do not fit.
    """
    import torch  # not above: checking takes no seconds

    (kind, _, name), default, head = spec.partition(":"), weights == "default", ""
    torch.manual_seed(0)
    if kind == "torchvision":
        models = import_module("torchvision.models")
        best = models.get_model_weights(name).DEFAULT
        encoder = models.get_model(name, weights=best if default else None)
        transform, parts = best.transforms(), dict(encoder.named_modules())
        ends = [name for name, part in parts.items() if isinstance(part, torch.nn.Linear)]
        head = (ends or ["classifier.1"])[-1]  # SqueezeNet's is a convolution
        parent, _, last = head.rpartition(".")
        setattr(parts[parent], last, torch.nn.Identity())
    elif kind == "timm":
        timm = import_module("timm")
        encoder = timm.create_model(name, pretrained=default, num_classes=0)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
        head = encoder.pretrained_cfg["classifier"]
    elif kind == "hf":
        hf = import_module("transformers")
        transform = hf.AutoImageProcessor.from_pretrained(name)
        if default:
            encoder, told = hf.AutoModel.from_pretrained(name, output_loading_info=True)
            if lacks := sorted(told["missing_keys"]):
                raise ValueError(f"{name} has no weights of {lacks[0]}: pass file.py:FUNCTION")
        else:
            encoder = hf.AutoModel.from_config(hf.AutoConfig.from_pretrained(name))
    elif kind == "open_clip":
        clip, (stem, _, tag) = import_module("open_clip"), name.partition("/")
        tags = clip.list_pretrained_tags_by_model(stem)
        fits = [one for one in tags if tag and one.startswith(tag)]
        if default and not fits:
            raise ValueError(unknown_name(f"weights of {stem}", tag, tags))
        full = (tag if tag in fits else fits[-1]) if default else None
        encoder, _, transform = clip.create_model_and_transforms(stem, full)
    else:
        script, _, factory = spec.rpartition(":")
        made = runpy.run_path(script)[factory]()
        encoder, transform = made if isinstance(made, tuple) else (made, None)
    if weights not in ("default", "none"):
        if weights.endswith(".safetensors"):  # as hubs keep them
            state = import_module("safetensors.torch").load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)  # also of a training checkpoint
        heads = tuple(f"{one}." for one in ([head] if isinstance(head, str) else head) if one)
        given = {key: value for key, value in state.items() if not key.startswith(heads)}
        missing, more = encoder.load_state_dict(given, strict=False)
        if missing or more:
            keys = f"missing {', '.join(missing[:3])}; unexpected {', '.join(more[:3])}"
            raise ValueError(f"{weights} does not fit {spec}: {keys}")
    if mean or std or size:
        side, t = size or 224, import_module("torchvision.transforms")
        scale = t.Normalize(mean or [0.485, 0.456, 0.406], std or [0.229, 0.224, 0.225])
        transform = t.Compose([t.Resize(side * 8 // 7), t.CenterCrop(side), t.ToTensor(), scale])
    if transform is None:
        raise ValueError(f"{spec} returns no transform: return a pair, or pass --mean and --std")
    return encoder.eval(), transform
