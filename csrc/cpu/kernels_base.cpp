#define FM_ISA isa_base
#define FM_ISA_NAME "base"
#define FM_VECTOR_BYTES 16
#define FM_REGISTERS 16
#define FM_EXECUTORS executors_base
#include "kernels.inl"
