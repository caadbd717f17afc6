#define FM_ISA isa_avx512
#define FM_ISA_NAME "avx512"
#define FM_VECTOR_BYTES 64
#define FM_REGISTERS 32
#define FM_EXECUTORS executors_avx512
#include "kernels.inl"
