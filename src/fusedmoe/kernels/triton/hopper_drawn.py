"""Tasks that programs draw from a counter, because some are done sooner than others.

The counter lies in the padding of a table, which holds R, one past the last slot, at first.
A program's producer draws; its consumers hear of what comes next through a box of two words.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from fusedmoe.kernels.triton.gluon_names import barrier


@gluon.jit
def open_box(CONSUMERS: gl.constexpr, WORD: gl.constexpr = gl.int32):
    """(words, full, empty): where the producer tells the consumers what comes next."""
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    words = gl.allocate_shared_memory(WORD, [2, 1], word)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    return words, full, empty


@gluon.jit
def no_word(words):
    return gl.full([1], 0, words.dtype, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))


@gluon.jit
def clear(box, number):
    """Wait until all consumers are done with what was in this word's place."""
    _, _, empty = box
    mbarrier.wait(empty.index(number % 2), number // 2 % 2 ^ 1)
    barrier()


@gluon.jit
def post(box, number, word):
    """Announce, where the place is clear."""
    words, full, _ = box
    words.index(number % 2).store(no_word(words) + word)
    barrier()
    mbarrier.arrive(full.index(number % 2), count=1)


@gluon.jit
def announce(box, number, word):
    """``word`` says what the ``number``-th task of this program is."""
    clear(box, number)
    post(box, number, word)


@gluon.jit
def read(box, number):
    """The word that was announced; it stays until this consumer lets it go."""
    words, full, _ = box
    mbarrier.wait(full.index(number % 2), number // 2 % 2)
    return gl.max(words.index(number % 2).load(no_word(words).type.layout), 0)


@gluon.jit
def let_go(box, number):
    _, _, empty = box
    barrier()
    mbarrier.arrive(empty.index(number % 2), count=1)


@gluon.jit
def hear(box, number):
    """The word that was announced."""
    word = read(box, number)
    let_go(box, number)
    return word


@gluon.jit
def draw(counter_ptr, before):
    """The next task that no program has begun; the counter started at ``before``. A program's first
    task is not drawn: it has the program's number."""
    return gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed") - before
