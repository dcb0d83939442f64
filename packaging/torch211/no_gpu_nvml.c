// The functions of NVIDIA's management library that FBGEMM's CUDA build binds when it is loaded, for
// machines without a driver: each answers NVML_ERROR_DRIVER_NOT_LOADED.
#define NO_GPU(name) \
  int name(void) { return 9; }

NO_GPU(nvmlInit_v2)
NO_GPU(nvmlDeviceGetCount_v2)
NO_GPU(nvmlDeviceGetHandleByIndex_v2)
NO_GPU(nvmlDeviceGetNvLinkRemotePciInfo_v2)
NO_GPU(nvmlDeviceGetNvLinkState)
NO_GPU(nvmlDeviceGetPciInfo_v3)
