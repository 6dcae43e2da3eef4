// What a launch of quantized_rows.cu is cut into, its blocks of slots, and the warp that fills its ring.

struct Arguments {
  TensorMap boxes, scale_boxes;
  const u8* weights;
  const u8* scale;
  const void* bias;
  const u16* x;
  void* out;
  const void* ids;
  const int* map;
  const int* experts;
  const int* sorted;
  const int* num_post;
  i64 stride_x;  // elements
  int R, num_mapped, num_local, last_block;
  float limit, alpha, beta;
};

// Of a row: a step is a pair of chunks, PAIRS of them a warp's at most.
constexpr int PAIRS = (S + KW - 1) / KW, FEWEST = S / KW;
// How many chunks share a scale, and sums of those are units; a pair at most where not all warps begin
// with a group (ALIGNED).
constexpr int GROUP_CHUNKS = WIDTH / CHUNK_COLS;
constexpr int GC = ALIGNED || GROUP_CHUNKS < 2 ? (GROUP_CHUNKS < 4 ? GROUP_CHUNKS : 4) : 2;
constexpr int UNITS = (2 * PAIRS + GC - 1) / GC;
// Sums of x of so many units stay in registers.
constexpr bool SUMS_STAY = ELEMENT != INT4 || UNITS * NT <= 4;
constexpr int SUM_BYTES = SUMS_STAY ? 0 : WARPS * UNITS * NT * 64;
// A product has eight columns. Where a chunk is a group and slots are fewer, so many neighbouring groups
// get columns of their own (SPLIT; x is zero in those of others), and sums take their scales once for
// all of them: two or four where a block has at most four or two slots, eight for LONE ones.
constexpr bool SPLITTING = NT == 1 && GROUP_CHUNKS == 1;
// Of a place of the ring: ROWS rows, shard by shard. BOXES: the copy engine brings them a line of 128
// bytes of each at a time, swizzled; otherwise they lie as in memory, so that two shards in turns stay
// so (ALTERNATING). Scales lie as in memory, SCALE_PITCH bytes apart.
constexpr int ROWS = WM * MT * 16;
constexpr bool BOXES = ROW_BYTES % 128 == 0, ALTERNATING = INTERLEAVED && !BOXES;
constexpr int RUNS = GATED && !INTERLEAVED ? 2 : 1;  // of neighbouring rows
constexpr int PLACE_BYTES = ROWS * ROW_BYTES;
// Scales lie as in memory, or (SCALE_BOX) so many bytes of each row at a time, SLICE in all from a
// multiple of 16 on; a warp's are in one of those.
constexpr int SCALE_ROW = SCALE_STRIDE * SCALE_BYTES;
constexpr int SLICE = PARTS == 1 ? SCALE_ROW : COLUMNS / WIDTH * SCALE_BYTES;
constexpr int SLICES = SCALE_BOX ? (SLICE + SCALE_BOX - 1) / SCALE_BOX : 1;
constexpr int SCALE_PITCH = SCALE_BOX ? SCALE_BOX : SCALE_ROW;
constexpr int PLACE_SCALES = SLICES * ROWS * SCALE_PITCH;
// Whether those of both chunks of a pair are read at once.
constexpr bool TWO_SCALES =
    GROUP_CHUNKS == 1 && SCALE_BYTES == 2 && SCALE_PITCH % 4 == 0 && SLICE % 4 == 0;
static_assert(FEATURES % FT == 0 && ROW_BYTES % STEP == 0 && (PARTS == 1 || BOXES), "");

// A stage of the ring: a place, its scales behind it; and what else a program has in shared memory.
constexpr int UNIT_ALIGNED = BOXES ? 1024 : 128;  // bytes
constexpr int UNIT_BYTES = (PLACE_BYTES + PLACE_SCALES + UNIT_ALIGNED - 1) / UNIT_ALIGNED * UNIT_ALIGNED;
constexpr int RING_BYTES = STAGES * UNIT_BYTES, EXCHANGE_BYTES = KW > 1 ? 2 * WARPS * NT * 512 : 0;
constexpr int BARRIER_BYTES = STAGES * 20 + 4 * WM * 8;

// Stage 0 is the ``first`` place, others follow it around.
struct Ring {
  u32 places, full;
  int first = 0;

  DEVICE Ring(u32 places, u32 barriers) : places(places), full(barriers) {}
  DEVICE int place_of(int stage) const {
    const int own = stage + first;
    return own < STAGES ? own : own - STAGES;
  }
  DEVICE u32 place(int stage) const { return places + place_of(stage) * UNIT_BYTES; }
  DEVICE u32 full_at(int stage) const { return full + stage * 8; }
  DEVICE u32 empty_at(int stage) const { return full + (STAGES + stage) * 8; }
  DEVICE u32 behind() const { return full + STAGES * 16; }
  DEVICE u32 item_at(int stage) const { return behind() + 4 * WM * 8 + stage * 4; }
};

// Steps of all items of this program, in order, each with its place in the ring.
struct Turns {
  int stage = 0, phase = 0;
  DEVICE void next() {
    stage = turn(stage, STAGES);
    phase ^= stage == 0;
  }
};

// Where row r of a tile of 16 lies among the rows, and the scales, of a place.
DEVICE int row_at(int tile, int r) {
  return GATED && !ALTERNATING ? tile * 8 + r % 8 + r / 8 * FT : tile * 16 + r;
}
DEVICE int scale_at(int tile, int r) {
  return INTERLEAVED && BOXES && !SCALE_BOX ? tile * 16 + r % 8 * 2 + r / 8 : row_at(tile, r);
}

// Of a block of slots; -1 where LONE slots have none.
DEVICE int expert_of(const Arguments& a, int block) {
  if (LONE) return lone_expert(a, block);
  if (MADE) return tables().experts[block];
  const int expert = load_past_l1(a.experts + min(block, a.last_block));
  return min(max(expert, 0), a.num_local - 1);
}
// In a place of a block; outside [0, R) where there is none.
DEVICE int slot_of(const Arguments& a, int block, int place) {
  if (LONE) return place == 0 ? block : -1;
  if (MADE) return tables().slot(block, place);
  return load_past_l1(a.sorted + block * BN + place);
}

// Programs have neighbouring items, so that rows of x rarely change and memory is read in long runs.
// Those that change x in between have fewer: a stretch counts as if it had SWITCH items more, before
// its own. Items of all blocks are far fewer than 2^32 / gridDim.x.
DEVICE int first_item(int stretches, int program) {
  const u32 at = (u32)(stretches * (TILES + SWITCH)) * program / gridDim.x;
  return (int)(at / (TILES + SWITCH) * TILES) + max((int)(at % (TILES + SWITCH)) - SWITCH, 0);
}

// Where nothing else has been in the ring's memory.
struct Anywhere {
  DEVICE void wait_for(int) {}
};
// Never more than AHEAD steps are on their way: whatever else is asked for waits behind them. ``room``
// is asked for each place. Returns the turn behind the last item.
template <class Room>
DEVICE Turns bring(const Arguments& a, int stretches, const Ring& ring, Room room) {
  const int lane = threadIdx.x & 31;
  Turns turns, late;
  int known = -1, expert = 0, asked = 0;
  const int end = first_item(stretches, blockIdx.x + 1);
  for (int at = first_item(stretches, blockIdx.x);; at++) {
    const int item = at < end ? at : -1;
    if (item >= 0 && item / TILES != known) {
      known = item / TILES;
      expert = expert_of(a, known / PARTS);
    }
    if (LONE && item >= 0 && expert < 0) continue;
    const u32 full = ring.full_at(turns.stage);
    wait_barrier(ring.empty_at(turns.stage), turns.phase ^ 1);
    room.wait_for(ring.place_of(turns.stage));
    if (AHEAD < STAGES && asked++ >= AHEAD) {
      wait_barrier(ring.full_at(late.stage), late.phase);
      late.next();
    }
    if (lane == 0) {
      store_shared(ring.item_at(turns.stage), item);
      expect(full, item < 0 ? 0 : PLACE_BYTES + PLACE_SCALES);
    }
    if (item < 0) return turns;
    __syncwarp();
    const u32 place = ring.place(turns.stage), scales = place + PLACE_BYTES;
    const int first = item % TILES * FT, part = known % PARTS;
    if (BOXES) {
      for (int i = lane; i < ROW_BYTES / 128; i += 32)
        copy_box(place + i * ROWS * 128, a.boxes, part * ROW_BYTES + i * 128, first, expert, full);
    } else if (lane < RUNS) {
      const i64 row = expert * EXPERT_ROWS + first * ROW_STEP + lane * SHARD_STEP;
      copy_bytes(place + lane * (ROWS / RUNS) * ROW_BYTES, a.weights + row * ROW_BYTES,
                 ROWS / RUNS * ROW_BYTES, full);
    }
    if (SCALE_BOX && lane < SLICES) {
      copy_box(scales + lane * ROWS * SCALE_BOX, a.scale_boxes,
               part * SLICE / 16 * 16 + lane * SCALE_BOX, first, expert, full);
    } else if (!SCALE_BOX && lane < RUNS) {
      const i64 row = expert * (EXPERT_SCALES / SCALE_STRIDE) + first * ROW_STEP + lane * SHARD_STEP;
      copy_bytes(scales + lane * (ROWS / RUNS) * SCALE_ROW, a.scale + row * SCALE_ROW,
                 ROWS / RUNS * SCALE_ROW, full);
    }
    turns.next();
  }
}
