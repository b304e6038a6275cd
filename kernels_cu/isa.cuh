// The front door to the machine: everything a kernel asks of the hardware is a function of namespace isa.
//
// The same names have two homes. isa_smXX.cuh spells them as PTX, one function for one instruction;
// emulator/isa_host.h spells them as calls into the emulator, which runs the same kernel on a CPU. A kernel
// includes this file and cannot tell which it got. This is the only file outside emulator/ with an #if.
#pragma once

#include "types.cuh"

#if defined(__CUDACC__)
#include "observe.cuh"
#include "isa_sm80.cuh"
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#include "isa_sm90.cuh"
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "isa_sm90a.cuh"
#endif
#else
#include "emulator/isa_host.h"
#include "emulator/observe.h"
#endif
