"""Safetensors files with a JSON header and a checksum: replaced atomically, and refused when damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dscl.utils.atomic_io import replace_atomically
from dscl.utils.errors import ExternalFailure, UserError


def write_checksummed(
    path: Path, kind: str, version: int, header: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write the tensors and the header to `path`, with `kind` (the type of the file), `version` and a checksum.

    The same content always gives the same bytes. Therefore the header is one entry of the metadata: the order of
    several entries would vary.
    """
    full_header = {"format": version, **header}
    full_header["checksum"] = _checksum(full_header, tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as partial:
            save_file(tensors, partial, {kind: json.dumps(full_header)})
    except (OSError, SafetensorError) as error:
        raise ExternalFailure(
            f"{path}: cannot be written ({error}); make room or mend the folder, and try again"
        ) from None


def read_checksummed(
    path: Path, kind: str, version: int, description: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a file of `write_checksummed`: its header and its tensors.

    `kind` and `version` must be those that it was written with; `description` names the type of file in errors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {description} is needed, as a run or an export writes it")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})[kind])
            file_version = header["format"]
            tensors = {name: file.get_tensor(name) for name in file.keys()} if file_version == version else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        problem = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: not {description}, or damaged ({problem}); copy it again or make it anew") from None
    if file_version != version:
        raise UserError(
            f"{path}: {description} of format {file_version}, this version reads {version}; use the dscl that wrote "
            "it, or make it anew"
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
