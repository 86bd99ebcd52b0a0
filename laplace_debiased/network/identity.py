"""Which model a posterior belongs to: names, shapes, dtypes and hashes of its tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.network.grad_modes import outside_inference_mode

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PARALLEL_BYTES = 8 * 2**20
"""Models above this size are hashed in two threads; hashing holds no interpreter lock."""


@dataclass(frozen=True)
class ModelFingerprint:
    """Identity of a model's weights, wherever they are stored.

    All parameters and all persistent buffers count (BatchNorm's running statistics are part of
    the function); the device, memory layout, mode, ``requires_grad`` and the sign of a zero do not.

    Attributes:
        entries: by qualified name, in alphabetical order, "digest dtype shape" of a parameter or
            buffer; a tied tensor counts under its first name. Plain values, as a state holds them.
        kinds: by qualified name, what every module is, as far as that decides its outputs in
            evaluation mode: its class, and behind a "|" what it prints of itself and whether its
            ``forward`` was replaced. None, or classes alone, as a file says.
    """

    entries: Mapping[str, str]
    kinds: Mapping[str, str] | None = field(default=None, compare=False)

    @property
    def digest(self) -> str:
        """SHA-256 of everything, hexadecimal."""
        whole = hashlib.sha256()
        for name, entry in self.entries.items():
            digest, dtype, shape = _parts(entry)
            whole.update(repr((name, shape, dtype, digest)).encode())
        return whole.hexdigest()

    def differences(self, other: ModelFingerprint, *, values: bool = True) -> tuple[str, ...]:
        """What ``other`` has differently, one phrase per entry; empty if it is the same model.

        Without ``values`` names, shapes and dtypes alone count.
        """
        found = [f"{name} is missing" for name in self.entries if name not in other.entries]
        found += [f"{name} is new" for name in other.entries if name not in self.entries]
        for name, one in self.entries.items():
            if name not in other.entries:
                continue
            (digest, dtype, shape), two = _parts(one), _parts(other.entries[name])
            if shape != two[2]:
                found.append(f"{name} has shape {list(two[2])}, not {list(shape)}")
            elif values and dtype != two[1]:
                found.append(f"{name} is {two[1]}, not {dtype}")
            elif values and digest != two[0]:
                found.append(f"{name} has other values")
        return (*found, *(self._other_kinds(other) if values else ()))

    def _other_kinds(self, other: ModelFingerprint) -> Iterator[str]:
        if self.kinds is None or other.kinds is None:
            return
        for name in sorted(self.kinds.keys() | other.kinds.keys()):
            one, two = (kinds.get(name, "nothing") for kinds in (self.kinds, other.kinds))
            if not ("|" in one and "|" in two):
                one, two = one.split("|")[0], two.split("|")[0]
            if one != two:
                shown = (kind.replace("|", " ").strip() for kind in (two, one))
                yield f"module {name!r} is {' and not '.join(shown)}"

    @property
    def modules(self) -> list[str] | None:
        """Plain values: name and class of every module; torch prints them otherwise elsewhere."""
        if self.kinds is None:
            return None
        return [f"{name}\t{kind.split('|')[0]}" for name, kind in self.kinds.items()]

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], modules: Sequence[str] | None = None
    ) -> ModelFingerprint:
        """Read :attr:`entries` and :attr:`modules`; up to version 5 [shape, dtype, digest].

        A ValueError says that it is something else.
        """
        entries = {}
        try:
            for name, entry in state.items():
                if isinstance(entry, str):
                    digest, dtype, shape = _parts(entry)
                else:
                    shape, dtype, digest = entry
                entries[name] = f"{digest} {dtype} {[int(size) for size in shape]}"
            return cls(entries, None if modules is None else dict(m.split("\t") for m in modules))
        except (AttributeError, TypeError, ValueError):
            raise ValueError(
                "the state's model fingerprint is damaged; save the posterior again."
            ) from None


def _parts(entry: str) -> tuple[str, str, tuple[int, ...]]:
    """Digest, dtype and shape of an entry."""
    digest, dtype, shape = entry.split(" ", 2)
    return digest, dtype, tuple(map(int, json.loads(shape)))


def fingerprint(model: nn.Module) -> ModelFingerprint:
    """Fingerprint of a model's present weights: reads every weight once."""
    named = sorted(named_tensors(model))
    tensors = [tensor for _, tensor in named]
    with ThreadPoolExecutor(2) as pool:
        is_large = sum(tensor.nbytes for tensor in tensors) > _PARALLEL_BYTES
        digests = list((pool.map if is_large else map)(tensor_digest, tensors))
    return ModelFingerprint(
        {
            name: f"{digest} {tensor.dtype} {list(tensor.shape)}"
            for (name, tensor), digest in zip(named, digests, strict=True)
        },
        module_kinds(model),
    )


_WITHOUT_EFFECT = (nn.Identity, nn.modules.dropout._DropoutNd)
"""Modules that do nothing in evaluation mode."""


_TRAINING_ONLY = re.compile(r"momentum=[^,]*(, )?")
"""What norms print of how they are trained."""


def module_kinds(model: nn.Module) -> dict[str, str]:
    """What every module of a model is; see :class:`ModelFingerprint`."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, _WITHOUT_EFFECT):
            own = " with a forward of its own" if "forward" in vars(module) else ""
            settings = _TRAINING_ONLY.sub("", module.extra_repr())
            found[name] = f"{type(module).__qualname__}|({settings}){own}"
    return found


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by qualified name; tied ones once."""
    yield from model.named_parameters()
    passing = {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        for buffer in module._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in passing)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's entries in row-major order, hexadecimal; ValueError without."""
    # Gradient and inference modes are per thread; nothing here must depend on the caller's.
    with outside_inference_mode(), torch.no_grad():
        values = tensor.detach()
        if values.is_meta or values.layout is not torch.strided:
            raise ValueError(
                f"the model has a tensor on the {values.device} device with layout "
                f"{values.layout}, whose values cannot be read; give it dense weights first."
            )
        if values.dtype in _FLOATS:
            values = values.cpu() + 0.0  # a step of length zero turns −0 into 0
        return hashlib.sha256(tensor_bytes(values)).hexdigest()


def digest_of(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of some tensors' bits, hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The bits of a tensor's entries in row-major order, as a buffer."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
