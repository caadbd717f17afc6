#define FM_ISA isa_avx2
#define FM_ISA_NAME "avx2"
#define FM_VECTOR_BYTES 32
#define FM_REGISTERS 16
#define FM_EXECUTORS executors_avx2
#include "kernels.inl"
