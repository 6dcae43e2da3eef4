"""Which nodes of a graph copy from and to given tensors, and when the driver has to move one."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fusedmoe.runner import graph_ends
from fusedmoe.runner.graph_ends import movable

KERNEL, COPY = 0, 1


class FakeDriver:
    """The driver's functions on nodes that are pairs of addresses, None for a kernel's node."""

    def __init__(self, nodes):
        self.nodes = nodes
        self.moves = []
        self.launches = []
        self.refuses = False

    def cuCtxGetCurrent(self, context):
        return 0

    def cuGraphLaunch(self, executable, stream):
        self.launches.append((executable, stream))
        return int(self.refuses)

    def cuGraphGetNodes(self, graph, nodes, count):
        if nodes is None:
            count._obj.value = len(self.nodes)
        else:
            nodes[:] = range(1, len(self.nodes) + 1)
        return 0

    def cuGraphNodeGetType(self, node, kind):
        kind._obj.value = KERNEL if self.nodes[node - 1] is None else COPY
        return 0

    def cuGraphMemcpyNodeGetParams(self, node, words):
        words._obj[graph_ends._SOURCE], words._obj[graph_ends._TARGET] = self.nodes[node - 1]
        return 0

    def cuGraphExecMemcpyNodeSetParams(self, executable, node, words, context):
        if self.refuses:
            return 1
        self.moves.append((node, words._obj[graph_ends._SOURCE], words._obj[graph_ends._TARGET]))
        return 0


class FakeGraph:
    def __init__(self):
        self.replays = 0

    def raw_cuda_graph(self):
        return 7

    def raw_cuda_graph_exec(self):
        return 8

    def replay(self):
        self.replays += 1


GRAPH = FakeGraph()


@pytest.fixture
def given():
    return torch.empty(3), torch.empty(4)


@pytest.fixture
def driver(given, monkeypatch):
    source, target = (tensor.data_ptr() for tensor in given)
    fake = FakeDriver([(source, 100), None, (300, 400), None, (200, target)])
    monkeypatch.setattr(graph_ends, "_driver", lambda: fake)
    return fake


@pytest.fixture
def others():
    return [torch.empty(2) for _ in range(4)]


def test_a_copy_keeps_its_other_end(driver, given, others):
    assert movable(GRAPH, given[:1], given[1:]).move(others[:2])
    addresses = [tensor.data_ptr() for tensor in others]
    assert driver.moves == [(1, addresses[0], 100), (5, 200, addresses[1])]


def test_an_address_that_it_has_costs_no_call(driver, given, others):
    graph = movable(GRAPH, given[:1], ())
    assert graph.move(given[:1])
    assert not driver.moves
    first, second = others[:2]
    for tensor in (first, first, second, second, first):
        assert graph.move([tensor])
    assert [move[1] for move in driver.moves] == [t.data_ptr() for t in (first, second, first)]


def test_a_refusal_is_not_taken_for_done(driver, given, others):
    graph = movable(GRAPH, given[:1], ())
    driver.refuses = True
    assert not graph.move(others[:1])
    assert not graph.move(others[:1])
    driver.refuses = False
    assert graph.move(given[:1])
    assert [move[1] for move in driver.moves] == [given[0].data_ptr()]


def test_a_tensor_that_no_node_copies_has_no_end(driver, given):
    assert movable(GRAPH, (torch.empty(2),), ()) is None
    assert movable(GRAPH, given[1:], given[:1]) is None


def test_without_a_driver_there_are_no_ends(monkeypatch, given):
    monkeypatch.setattr(graph_ends, "_driver", lambda: None)
    assert movable(GRAPH, given[:1], given[1:]) is None


@pytest.mark.parametrize(("current", "refuses"), [(0, False), (1, False), (0, True)])
def test_torch_launches_where_the_driver_would_not(driver, given, monkeypatch, current, refuses):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    driver.refuses = refuses
    graph = FakeGraph()
    movable(graph, given[:1], given[1:]).launch(0, 99)
    assert driver.launches == ([] if current else [(8, 99)])
    assert graph.replays == (current or refuses)


def test_the_words_are_those_of_the_drivers_structure():
    """CUDA_MEMCPY3D of cuda.h."""
    half = [
        *[(name, ctypes.c_size_t) for name in ("x", "y", "z", "lod")],
        ("kind", ctypes.c_int),
        *[(name, ctypes.c_void_p) for name in ("host", "device", "array", "reserved")],
        *[(name, ctypes.c_size_t) for name in ("pitch", "height")],
    ]

    class Structure(ctypes.Structure):
        _fields_ = [
            *[(f"src_{name}", kind) for name, kind in half],
            *[(f"dst_{name}", kind) for name, kind in half],
            *[(name, ctypes.c_size_t) for name in ("width", "rows", "depth")],
        ]

    assert ctypes.sizeof(Structure) == 8 * graph_ends._WORDS
    assert Structure.src_device.offset == 8 * graph_ends._SOURCE
    assert Structure.dst_device.offset == 8 * graph_ends._TARGET
