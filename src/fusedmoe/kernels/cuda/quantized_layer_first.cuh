// The text of quantized_rows.cu's GEMM stands twice in quantized_layer.cu, once for each of a layer's.
// What follows is the first one's; FIRST_ and SECOND_ go before names of constants that may differ.

#define COLUMNS OF_GEMM(COLUMNS)
#define PARTS OF_GEMM(PARTS)
#define TOP_K OF_GEMM(TOP_K)
#define WIDE OF_GEMM(WIDE)
#define BIAS OF_GEMM(BIAS)
#define FEATURES OF_GEMM(FEATURES)
#define INTERLEAVED OF_GEMM(INTERLEAVED)
#define EXPERT_SCALES OF_GEMM(EXPERT_SCALES)
#define SCALE_STRIDE OF_GEMM(SCALE_STRIDE)
#define FORMULA OF_GEMM(FORMULA)
#define GATED OF_GEMM(GATED)
#define LIMITED OF_GEMM(LIMITED)
#define MT OF_GEMM(MT)
#define KW OF_GEMM(KW)
#define WM OF_GEMM(WM)
#define SCALE_BOX OF_GEMM(SCALE_BOX)
#define STAGES OF_GEMM(STAGES)
#define AHEAD OF_GEMM(AHEAD)
#define SWITCH OF_GEMM(SWITCH)
#define WHOLE OF_GEMM(WHOLE)
#define ALIGNED OF_GEMM(ALIGNED)

#define OF_GEMM(name) FIRST_##name
namespace first {
