"""Measurements on disk as they come, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusedmoe.tuning.json_fields import integer_of, word_of
from fusedmoe.tuning.table_file import cost_of, read_json, write_atomically
from fusedmoe.tuning.tile_records import Tile, tile_from_json, tile_to_json
from fusedmoe.tuning.tuned_kernels import TunedKernel
from fusedmoe.tuning.tuned_table import LayerKey
from fusedmoe.tuning.tuner.search import Timer

Key = tuple[str, int, int]


class Journal:
    """A timer that remembers, in ``path``, what the timer behind it measured.

    A request is answered from memory where all its tiles are known with that many samples, else
    measured as a whole, since times from different moments do not compare. ``subject`` says what
    is measured; a file about something else is refused with ValueError.
    """

    def __init__(self, timer: Timer, path: Path, subject: dict[str, Any]) -> None:
        self._timer, self._path, self._subject = timer, path, subject
        self._known: dict[Key, dict[Tile, float]] = {}
        if path.exists():
            self._read()

    def prepare(self, stage: str, tiles: Sequence[Tile]) -> None:
        self._timer.prepare(stage, tiles)

    def time(self, stage: str, T: int, tiles: Sequence[Tile], samples: int) -> list[float]:
        known = self._known.setdefault((stage, T, samples), {})
        if not all(tile in known for tile in tiles):
            times = self._timer.time(stage, T, tiles, samples)
            known.update(zip(tiles, times, strict=True))
            self._write()
        return [known[tile] for tile in tiles]

    @property
    def measurements(self) -> list[dict[str, Any]]:
        """Everything measured, one record per stage, token count, samples and tile."""
        return [
            {"stage": stage, "T": T, "samples": samples}
            | {"tile": tile_to_json(tile), "us": us if math.isfinite(us) else None}
            for (stage, T, samples), known in self._known.items()
            for tile, us in known.items()
        ]

    def _write(self) -> None:
        record = {"subject": self._subject, "measurements": self.measurements}
        write_atomically(self._path, json.dumps(record))

    def _read(self) -> None:
        record = read_json(self._path, most=MAX_JOURNAL_BYTES)
        try:
            if record["subject"] != self._subject:
                raise ValueError(
                    f"it is about {record['subject']!r:.200}, this search about "
                    f"{self._subject!r:.200}"
                )
            for one in record["measurements"]:
                T, samples = (integer_of(one[name], name) for name in ("T", "samples"))
                known = self._known.setdefault((word_of(one["stage"], "stage"), T, samples), {})
                known[tile_from_json(one["tile"])] = cost_of(one["us"], "us")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._path} cannot be resumed (remove it to begin anew): {error}"
            ) from None


MAX_JOURNAL_BYTES = 1 << 25


def subject(
    kernel: TunedKernel, key: LayerKey, tokens: Sequence[int], device: str, triton: str | None
) -> dict[str, Any]:
    """What a search measures: the layer, the batch sizes, the device and the code."""
    return {
        "layer": asdict(key),
        "tokens": list(tokens),
        "device": device,
        "triton": triton,
        "kernel": kernel.name,
        "kernel_version": kernel.version,
    }
