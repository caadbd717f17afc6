#define FM_EXECUTORS executors_avx512
#define FM_VECTOR_BYTES 64
#define FM_REGISTERS 32
#include "execute.inl"
