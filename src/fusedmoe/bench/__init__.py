"""Measuring a layer against its limit and its peers, the same way everywhere.

``run_layer_bench`` times, interleaved, this library's layer and Transformers' experts on random
data, together with the machine's ceilings, and returns a report in one schema.
"""

from fusedmoe.bench.report import BenchReport, BenchRow
from fusedmoe.bench.run import check_request, run_layer_bench
from fusedmoe.bench.shapes import SHAPES, LayerShape

__all__ = ["SHAPES", "BenchReport", "BenchRow", "LayerShape", "check_request", "run_layer_bench"]
