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

struct Ring {
  u32 places, scales, items, full, empty;

  DEVICE u32 full_at(int stage) const { return full + stage * 8; }
  DEVICE u32 empty_at(int stage) const { return empty + stage * 8; }
};

// Where row r of a tile of 16 lies among the rows, and the scales, of a place.
DEVICE int row_at(int tile, int r) {
  return GATED && !ALTERNATING ? tile * 8 + r % 8 + r / 8 * FT : tile * 16 + r;
}
DEVICE int scale_at(int tile, int r) {
  return INTERLEAVED && BOXES && !SCALE_BOX ? tile * 16 + r % 8 * 2 + r / 8 : row_at(tile, r);
}

// Where this thread's row of an ldmatrix has chunk c of this warp's, of a tile at ``tile``.
DEVICE u32 chunk_at(const Place& p, u32 tile, int row, int c) {
  if (!BOXES) return tile + row * ROW_BYTES + p.k_begin * STEP + (p.lane >> 4) * 16 + c * 16;
  const u32 own = tile + row * 128;
  if (WHOLE)  // every warp begins with a line
    return own + (p.k_begin / 4 + c / 8) * (ROWS * 128) +
           ((((p.lane >> 4) ^ row & 7) ^ c & 7) << 4);
  const int chunk = p.k_begin * 2 + c + (p.lane >> 4);
  return own + (chunk >> 3) * (ROWS * 128) + (((chunk ^ row) & 7) << 4);
}

// MADE: which slots are a block every program works out from their ids, which takes less than to
// launch what would. By experts, then in the order of slots.
constexpr int MOST_MADE = 32;
constexpr u16 NONE = 0xFFFF;
struct Tables {
  u16 experts_of[MOST_MADE], leaders[MOST_MADE];   // of a slot; of those that are a block's first
  u16 experts[MOST_MADE], places[MOST_MADE * BN];  // of a block
  int blocks;
};
constexpr int TABLES_AT = (STAGES * (PLACE_BYTES + PLACE_SCALES + 20) + SUM_BYTES + 32 * WM +
                           (KW > 1 ? 2 * WARPS * NT * 512 : 0) + 15) / 16 * 16;
DEVICE Tables& tables() {
  DYNAMIC_SHARED(memory);
  return *(Tables*)(memory + TABLES_AT);
}
// Eight of a row of numbers.
struct Eight {
  u16 of[8];
  DEVICE Eight(const u16* from) {
    const uint4 v = *(const uint4*)from;
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; i++) of[i] = (u16)(words[i / 2] >> i % 2 * 16);
  }
};
DEVICE int make_tables(const Arguments& a) {
  Tables& made = tables();
  const int own = threadIdx.x, expert = own < MOST_MADE ? lone_expert(a, own) : -1;
  for (int i = own; i < MOST_MADE * BN / 2; i += (WARPS + BRINGERS) * 32) ((u32*)made.places)[i] = ~0u;
  if (own < MOST_MADE) made.experts_of[own] = (u16)expert;
  __syncthreads();
  int rank = 0, blocks = 0, before = 0;
  for (int i = 0; own < MOST_MADE && i < a.R; i += 8) {
    const Eight eight(made.experts_of + i);
#pragma unroll
    for (int j = 0; j < 8; j++) rank += i + j < own && eight.of[j] == (u16)expert;
  }
  const bool leads = expert >= 0 && rank % BN == 0;
  if (own < MOST_MADE) made.leaders[own] = leads ? (u16)expert : NONE;
  __syncthreads();
  for (int i = 0; own < MOST_MADE && i < a.R; i += 8) {
    const Eight eight(made.leaders + i);
#pragma unroll
    for (int j = 0; j < 8; j++) blocks += eight.of[j] != NONE, before += eight.of[j] < (u16)expert;
  }
  if (expert >= 0) {
    made.places[before * BN + rank] = (u16)own;
    if (leads) made.experts[before + rank / BN] = (u16)expert;
  }
  if (own == 0) made.blocks = blocks;
  __syncthreads();
  return made.blocks;
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
  if (MADE) return (short)tables().places[block * BN + place];
  return load_past_l1(a.sorted + block * BN + place);
}

// Programs have neighbouring items, so that rows of x rarely change and memory is read in long runs.
// Those that change x in between have fewer: a stretch counts as if it had SWITCH items more, before
// its own. Items of all blocks are far fewer than 2^32 / gridDim.x.
DEVICE int first_item(int stretches, int program) {
  const u32 at = (u32)(stretches * (TILES + SWITCH)) * program / gridDim.x;
  return (int)(at / (TILES + SWITCH) * TILES) + max((int)(at % (TILES + SWITCH)) - SWITCH, 0);
}

// Never more than AHEAD steps are on their way: whatever else is asked for waits behind them.
DEVICE void bring(const Arguments& a, int stretches, const Ring& ring) {
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
    if (AHEAD < STAGES && asked++ >= AHEAD) {
      wait_barrier(ring.full_at(late.stage), late.phase);
      late.next();
    }
    if (lane == 0) {
      store_shared(ring.items + turns.stage * 4, item);
      expect(full, item < 0 ? 0 : PLACE_BYTES + PLACE_SCALES);
    }
    if (item < 0) break;
    __syncwarp();
    const u32 place = ring.places + turns.stage * PLACE_BYTES;
    const u32 scales = ring.scales + turns.stage * PLACE_SCALES;
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
