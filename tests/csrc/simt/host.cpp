#include "host.h"

#include <cstring>

namespace simt {

Host host;

cudaError_t refuse(cudaError_t error, const std::string& what) {
  host.error = what;
  return error;
}

cudaError_t check_stream(cudaStream_t stream) {
  if (stream != host.stream) {
    return refuse(cudaErrorInvalidResourceHandle,
                  "work is queued on another than the current stream");
  }
  if (host.guards == 0) {
    return refuse(cudaErrorInvalidResourceHandle, "work is queued without a device guard");
  }
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  if (const cudaError_t error = check_stream(config.stream); error != cudaSuccess) return error;
  if (host.launches++ == host.failing_launch) {
    return refuse(cudaErrorLaunchFailure, "this launch was told to fail");
  }
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const bool valid = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y == 1 && grid.z == 1 &&
                     block.x >= 1 && block.x <= 1024 && block.y == 1 && block.z == 1 &&
                     config.dynamicSmemBytes == 0;
  if (!valid) return refuse(cudaErrorInvalidConfiguration, "invalid configuration argument");
  host.copies.clear();
  const std::string error = run(grid.x, block.x, body);
  return error.empty() ? cudaSuccess : refuse(cudaErrorLaunchFailure, error);
}

}  // namespace simt

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (const cudaError_t error = simt::check_stream(stream); error != cudaSuccess) return error;
  if (kind == cudaMemcpyDeviceToHost) {
    memset(to, 0xa5, size);
    simt::host.copies.push_back({to, from, size});
  } else {
    memcpy(to, from, size);
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  if (const cudaError_t error = simt::check_stream(stream); error != cudaSuccess) return error;
  memset(to, value, size);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  if (simt::host.capturing) {
    return simt::refuse(cudaErrorStreamCaptureUnsupported,
                        "the host waits while a graph is captured");
  }
  for (const simt::Copy& copy : simt::host.copies) memcpy(copy.to, copy.from, copy.size);
  simt::host.copies.clear();
  return cudaSuccess;
}

// --- what tests set and read ---------------------------------------------------------------------

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT void simt_set_schedule(int schedule, uint64_t seed) {
  simt::set_schedule(static_cast<simt::Schedule>(schedule), seed);
}
SIMT_EXPORT void simt_detect_races(bool on) { simt::detect_races(on); }
SIMT_EXPORT void simt_capture(bool on) { simt::host.capturing = on; }
SIMT_EXPORT int simt_launches() { return simt::host.launches; }
SIMT_EXPORT void simt_fail_launch(int number) {
  simt::host.launches = 0;
  simt::host.failing_launch = number;
}
