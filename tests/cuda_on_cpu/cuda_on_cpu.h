// cuda_on_cpu.h: CUDA C++ kernels on the CPU. kernels/device.cuh includes this in place of the PTX
// wrappers when the compiler is neither nvcc nor NVRTC.
//
// Every CUDA thread is a fiber of one system thread. A fiber runs until it waits (at a barrier, a
// warp operation, __nanosleep), then the schedule picks another that can go on: fifo, lifo or
// seeded random. Blocks run one after the other or, resident, all side by side. What a kernel does
// wrong becomes a message naming block, thread and line: see README.md.
//
// A kernel file is one translation unit with an EMU_EXPORT(kernel) line for each kernel behind it;
// the Python side (build.py, launch.py) calls emu_launch_<kernel>.
#pragma once
#include "language.h"

#include "sanitizers.h"

#include "context.h"
#include "state.h"

#include "fibers.h"
#include "memory.h"
#include "warp.h"

#include "maths.h"
#include "matrix.h"

#include "faults.h"
#include "launch.h"

#include "export.h"
#include "intrinsics.h"
