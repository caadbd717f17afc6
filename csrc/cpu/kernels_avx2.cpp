#define FM_ISA isa_avx2
#define FM_ISA_NAME "avx2"
#define FM_VECTOR_BYTES 32
#define FM_REGISTERS 16
#include "kernels.inl"
