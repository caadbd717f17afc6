#define FM_EXECUTORS executors_avx2
#define FM_VECTOR_BYTES 32
#define FM_REGISTERS 16
#include "execute.inl"
