"""Tensors with a header in one file that carries its checksum: complete under its name, or refused when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dscl.utils.errors import Failure, UserError


def write_stamped(
    path: Path, kind: str, version: int, header: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """The same bytes for the same content: the header is the one entry of the metadata, as several would vary."""
    whole = {"format": version, **header}
    whole["checksum"] = _checksum(whole, tensors)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {kind: json.dumps(whole)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise Failure(f"{path}: cannot be written ({error}); make room or mend the folder, and try again") from None


def read_stamped(path: Path, kind: str, version: int, what: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and the tensors that `write_stamped` was given; `what` the file is in words, for refusals."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {what} is needed, as a run or an export writes it")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})[kind])
            found = header["format"]
            tensors = {name: file.get_tensor(name) for name in file.keys()} if found == version else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        problem = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: not {what}, or damaged ({problem}); copy it again or make it anew") from None
    if found != version:
        raise UserError(
            f"{path}: {what} of format {found}, this version reads {version}; use the dscl that wrote it, or make it "
            "anew"
        )
    if header.pop("checksum", None) != _checksum(header, tensors):
        raise UserError(f"{path}: damaged, its content does not match its checksum; copy it again or make it anew")
    return header, tensors


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
