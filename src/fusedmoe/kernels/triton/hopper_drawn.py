"""Tasks that programs draw from a counter, because some are done sooner than others.

The counter lies in padding of a table, which holds R, one past the last slot, before anybody draws.
A program's producer draws; its consumers hear of what comes next through a box of two words.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def open_box(CONSUMERS: gl.constexpr):
    """(words, full, empty): where the producer tells the consumers what comes next."""
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    words = gl.allocate_shared_memory(gl.int32, [2, 1], word)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    return words, full, empty


@gluon.jit
def one_word():
    return gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))


@gluon.jit
def announce(box, number, word):
    """``word``, not negative, says what the ``number``-th task of this program is."""
    words, full, empty = box
    mbarrier.wait(empty.index(number % 2), number // 2 % 2 ^ 1)
    gl.thread_barrier()
    words.index(number % 2).store(one_word() + word)
    gl.thread_barrier()
    mbarrier.arrive(full.index(number % 2), count=1)


@gluon.jit
def hear(box, number):
    """The word that was announced."""
    words, full, empty = box
    mbarrier.wait(full.index(number % 2), number // 2 % 2)
    word = gl.max(words.index(number % 2).load(one_word().type.layout), 0)
    gl.thread_barrier()
    mbarrier.arrive(empty.index(number % 2), count=1)
    return word


@gluon.jit
def draw(counter_ptr, before):
    """The next task that no program has begun; the counter was ``before`` when nobody had drawn.
    Each program's first task has its own number."""
    return gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed") - before
