// The arguments of an op and where to run it: a device and one of its streams.
#pragma once

#include "../arguments.h"
#include "device.h"

namespace qgm::cuda {

struct GossipStepArguments : qgm::GossipStepArguments {
  int device;
  cudaStream_t stream;
};

struct LocalStepArguments : qgm::LocalStepArguments {
  int device;
  cudaStream_t stream;
};

struct MergeArguments : qgm::MergeArguments {
  int device;
  cudaStream_t stream;
};

struct ReduceArguments : qgm::ReduceArguments {
  double* scratch;  // [rows, blocks of a row]; [blocks of a row] for consensus_distance
  int device;
  cudaStream_t stream;
};

}  // namespace qgm::cuda
