"""Log-probabilities of a reference, remembered on disk.

    cache = ppcompile.CachedReference("reference.sqlite", ppcompile.wrap(frozen_model))
    cache.fill(loader)                                   # once; then the model can go
    cache = ppcompile.CachedReference("reference.sqlite", name=cache.name)
    logps = ppcompile.reference_logps(cache, batch)

What is remembered belongs to a sequence, not to a pack: the key is a hash of its token ids and of which of them are
scored, so that packs may fall differently in each epoch, on each rank, and under each packing. The file belongs to one
reference, by a hash of its weights or a name of your own; opening it with another is refused.

A killed process leaves whole entries, and several processes may fill one file at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .logp_store import LogpStore, Row
from .packed_model import PackedModel, PackedOutput
from .reference import AdaptersOff, evaluate, named_tensors
from .runtime.batch import PackedBatch

__all__ = ["CachedReference", "weights_fingerprint"]

VOLATILE = ("_name_or_path", "transformers_version", "dtype", "use_cache")
"""Entries of a transformers configuration that do not change what the weights compute in eval mode."""


class CachedReference:
    """A reference that looks its answers up, and asks ``reference`` for what it has not seen.

    Attributes:
        path: the SQLite file.
        reference: a wrapped model or :class:`AdaptersOff`; ``None`` for a cache that is only read.
        name: what the file belongs to.
    """

    def __init__(
        self, path: str | Path, reference: PackedModel | AdaptersOff | None = None, *, name: str | None = None
    ) -> None:
        """Open or create the file.

        Args:
            path: where it is; its folder must exist.
            reference: what answers for sequences that are not in the file; it must not be trained.
            name: your own word for the reference's weights, in place of their hash (see :func:`weights_fingerprint`).

        Raises:
            TypeError: ``reference`` is of another kind.
            ValueError: the file belongs to another reference or is none of ours, or neither ``reference`` nor ``name``
                is given.
            FileNotFoundError: the folder of ``path``, or without ``reference`` the file, is not there.
        """
        if reference is not None and not isinstance(reference, (PackedModel, AdaptersOff)):
            raise TypeError(f"reference must be a wrapped model or AdaptersOff, got {type(reference).__name__}")
        if name is None:
            if reference is None:
                raise ValueError(
                    "a cache belongs to one reference: give reference=, or name= as the file was made with"
                )
            name = weights_fingerprint(reference)
        self.path = Path(path)
        self.reference = reference
        missing = self.path if reference is None else self.path.parent
        if not missing.exists():
            raise FileNotFoundError(f"{missing} is not there, and without it there is nothing to read or to write")
        self.name = name
        self._versions = self._weight_versions()
        self._store = LogpStore(self.path, name)

    def reference_output(self, batch: PackedBatch) -> PackedOutput:
        """The remembered log-probabilities of the batch's responses; those of new sequences are computed and kept.

        Raises:
            LookupError: there are new sequences, and no ``reference``.
            RuntimeError: there are, and the weights of ``reference`` have changed since the cache was opened.
        """
        keys = sequence_keys(batch)
        rows = self._store.read(keys)
        absent = [n for n, key in enumerate(keys) if key not in rows]
        if absent:
            rows |= self._computed(batch, keys, absent)
        return self._output(batch, [rows[key] for key in keys])

    def fill(self, batches: Iterable[PackedBatch]) -> int:
        """Compute and keep what is missing for these batches; the number of sequences that were."""
        before = len(self)
        for batch in batches:
            self.reference_output(batch)
        return len(self) - before

    def __len__(self) -> int:
        return len(self._store)

    # ------------------------------------------------------------------ computing

    def _computed(self, batch: PackedBatch, keys: list[bytes], absent: list[int]) -> dict[bytes, Row]:
        if self.reference is None:
            raise LookupError(
                f"{len(absent)} of {len(keys)} responses of the batch are not in {self.path} of {self.name!r}, for one "
                f"response {absent[0]}. Try: CachedReference(path, reference, name=...) to compute them, or fill() "
                "with the data as it is packed now (truncation changes sequences)"
            )
        if self._weight_versions() != self._versions:
            raise RuntimeError(
                f"the weights of the reference have changed since {self.path} was opened for {self.name!r}: a policy "
                "in training is no reference. Try: a frozen copy, or AdaptersOff"
            )
        packed = self.reference
        output = evaluate(packed, batch) if isinstance(packed, PackedModel) else packed.reference_output(batch)
        sums, tokens = output.logps.float().cpu().numpy(), output.token_logps.float().cpu().numpy()
        ends = output.lengths.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        # The sum as the model added it up, then each token: another order of adding would move the last bit.
        rows = {keys[n]: np.concatenate([sums[n : n + 1], tokens[starts[n] : ends[n]]]) for n in absent}
        self._store.write(rows)
        return rows

    def _weight_versions(self) -> tuple[int, ...]:
        """Changes whenever a weight is written to."""
        if self.reference is None:
            return ()
        return tuple(0 if t.is_inference() else t._version for _, t in _tensors(self.reference))

    def _output(self, batch: PackedBatch, rows: list[Row]) -> PackedOutput:
        lengths = batch.lengths.tolist()
        wrong = [n for n, (row, length) in enumerate(zip(rows, lengths, strict=True)) if len(row) != length + 1]
        if wrong:
            raise ValueError(
                f"{self.path} is damaged: its entry for response {wrong[0]} has the wrong length; remove it"
            )
        sums = torch.from_numpy(np.array([row[0] for row in rows], dtype=np.float32))
        tokens = torch.from_numpy(np.concatenate([row[1:] for row in rows]))
        return PackedOutput(sums.to(batch.device), tokens.to(batch.device), batch.lengths)


# --------------------------------------------------------------------------- keys and names


def sequence_keys(batch: PackedBatch) -> list[bytes]:
    """For each response, a hash of its whole sequence and of which of its tokens are scored: 16 bytes."""
    positions = batch.scored_positions.cpu().numpy()
    scored = np.split(positions, batch.lengths.cumsum(0)[:-1].cpu().numpy())
    keys = []
    for ids, where in zip(batch.sequences(), scored, strict=True):
        hashed = hashlib.blake2b(len(ids).to_bytes(8, "little"), digest_size=16)
        hashed.update(ids.astype("<i8").tobytes())
        hashed.update(where.astype("<i8").tobytes())
        keys.append(hashed.digest())
    return keys


def weights_fingerprint(reference: PackedModel | AdaptersOff) -> str:
    """Type, configuration, and every weight and buffer of a reference, as one hash.

    Reads all weights once, about a second per gigabyte.

    Raises:
        ValueError: weights that this process does not have whole, on the meta device or sharded.
    """
    model = _plain(reference)
    hashed = hashlib.sha256(_configuration(model).encode())
    for name, tensor in _tensors(reference):
        if tensor.is_meta or type(tensor.data) is not Tensor:
            kind = "on the meta device" if tensor.is_meta else f"a {type(tensor.data).__name__}"
            raise ValueError(f"{name} is {kind} and cannot be read as a whole here; name the weights yourself, name=")
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        data: Any = tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy()  # any dtype, as bytes
        hashed.update(data)
    return f"{type(model).__name__} sha256:{hashed.hexdigest()}"


def _tensors(reference: PackedModel | AdaptersOff) -> Iterator[tuple[str, Tensor]]:
    return reference.base_tensors() if isinstance(reference, AdaptersOff) else named_tensors(reference.unwrapped)


def _plain(reference: PackedModel | AdaptersOff) -> nn.Module:
    if isinstance(reference, PackedModel):
        return reference.unwrapped
    adapted: Any = reference.packed.unwrapped  # peft has no types
    base: nn.Module = adapted.get_base_model()
    return base


def _configuration(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    entries = config.to_dict() if hasattr(config, "to_dict") else {}
    return json.dumps({k: v for k, v in entries.items() if k not in VOLATILE}, sort_keys=True, default=str)
