// Takes the place of the header of this name when kernels are compiled for the host.
#pragma once
#include "cuda_emulation.h"
