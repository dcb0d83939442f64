// The functions of torch's C interface that a torch without CUDA does not have, or that would ask
// for a GPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>

#include "host.h"

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = simt::host.stream;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++simt::host.guards;
  *guard = reinterpret_cast<DeviceGuardHandle>(&simt::host);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --simt::host.guards;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool,
                                        char** message) {
  *message = error == cudaSuccess ? nullptr : strdup(("CUDA error: " + simt::host.error).c_str());
  return AOTI_TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char* message) { free(message); }
