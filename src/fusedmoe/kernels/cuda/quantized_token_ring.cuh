// The ring of quantized_token_rows.cu: whole tiles, which all warps share and one thread asks for. A
// step is a tile of w1 (16 neighbouring rows of each shard's eight) or of w2 (a unit of a pair of
// picks); step s of a block has place s % STAGES.

constexpr int UP_BYTES = HIDDEN / 2, DOWN_BYTES = INTERMEDIATE / 2;  // of a row
constexpr int TILE_BYTES = 16 * (UP_BYTES > DOWN_BYTES ? UP_BYTES : DOWN_BYTES);
static_assert(RING_BYTES == STAGES * TILE_BYTES && RING_BARRIERS == 2 * STAGES, "");

struct Ring {
  u32 memory;

  DEVICE u32 place(int step) const { return memory + step % STAGES * TILE_BYTES; }
  DEVICE u32 full(int step) const { return memory + RING_BARRIERS_AT + step % STAGES * 8; }
  DEVICE u32 empty(int step) const { return full(step) + STAGES * 8; }
  DEVICE int phase(int step) const { return step / STAGES & 1; }
  DEVICE void begin() const {
    if (threadIdx.x >= STAGES) return;
    begin_barrier(full(threadIdx.x), 1);
    begin_barrier(empty(threadIdx.x), WARPS);
  }
  DEVICE void wait(int step) const { wait_barrier(full(step), phase(step)); }
  // By every warp. What it read of the place is in sums that it has stored: an arrival does not wait
  // for loads on their way.
  DEVICE void give_back(int step) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) arrive(empty(step));
  }
};

// One thread asks for everything, in the order in which it is needed.
struct Bringer {
  const Arguments& a;
  const Live& live;
  const Part& part;
  const Ring& ring;

  DEVICE void expect_at(int step, int bytes) const {
    wait_barrier(ring.empty(step), ring.phase(step) ^ 1);
    expect(ring.full(step), bytes);
  }
  DEVICE void up() const {
    constexpr int RUNS = INTERLEAVED ? 1 : SHARDS, ROWS = 16 / RUNS;
#pragma unroll 1
    for (int step = 0; step < part.tiles; step++) {
      const int tile = part.tile + step;
      const i64 row = live.experts[tile / UP_TILES] * (i64)(SHARDS * INTERMEDIATE) +
                      tile % UP_TILES * ROWS;
      expect_at(step, 16 * UP_BYTES);
#pragma unroll
      for (int run = 0; run < RUNS; run++)
        copy_bytes(ring.place(step) + run * ROWS * UP_BYTES,
                   a.first_rows + (row + run * INTERMEDIATE) * UP_BYTES, ROWS * UP_BYTES,
                   ring.full(step));
    }
  }
  DEVICE void down() const {
    int step = part.tiles;
#pragma unroll 1
    for (int rank = 0; rank < live.count; rank += 2)
#pragma unroll 1
      for (int unit = 0; unit < part.units; unit++, step++) {
        const int picks = min(2, live.count - rank);
        expect_at(step, picks * 8 * DOWN_BYTES);
#pragma unroll 1
        for (int i = 0; i < picks; i++) {
          const i64 row = live.experts[rank + i] * (i64)HIDDEN + (part.unit + unit) * 8;
          copy_bytes(ring.place(step) + i * 8 * DOWN_BYTES, a.second_rows + row * DOWN_BYTES,
                     8 * DOWN_BYTES, ring.full(step));
        }
      }
  }
};
