#define FM_EXECUTORS executors_base
#define FM_VECTOR_BYTES 16
#define FM_REGISTERS 16
#include "execute.inl"
