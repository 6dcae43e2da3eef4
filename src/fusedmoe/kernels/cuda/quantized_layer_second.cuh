}  // namespace first
#undef OF_GEMM
#define OF_GEMM(name) SECOND_##name
namespace second {
