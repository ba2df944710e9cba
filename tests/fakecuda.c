// A CUDA without a GPU: memory and copies are real and lie on the host, kernels and NVIDIA's libraries do nothing.
// Here is what has to answer, without last arguments that are not read; test_fakecuda.py adds the rest, returning 0.
#include <driver_types.h>
#include <string.h>
#include <sys/mman.h>

#define HALF (1UL << 39) // addresses of the card, then as many of pinned memory
#define CARD (80UL << 30)
#define ANSWER(name, parameters, action) int name parameters { action; return 0; }

_Atomic long fake_launches, fake_copies, fake_waits;
static char *start;
static _Atomic size_t used[2];

__attribute__((constructor)) static void reserve(void)
{
    start = mmap(0, 2 * HALF, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void *allocate(int pinned, size_t size)
{
    size = (size + 4095) & ~4095UL;
    return start + pinned * HALF + (used[pinned] += size) - size;
}
ANSWER(cudaMalloc, (void **to, size_t size), *to = allocate(0, size))
ANSWER(cudaHostAlloc, (void **to, size_t size), *to = allocate(1, size))
ANSWER(cudaGetSymbolAddress, (void **to), *to = allocate(0, 4096))
ANSWER(cudaMemGetInfo, (size_t *left, size_t *total), *total = CARD; *left = CARD - used[0])

static enum cudaMemoryType type_of(const void *address)
{
    size_t offset = (char *)address - start;
    return offset < HALF ? cudaMemoryTypeDevice : offset < 2 * HALF ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
}
ANSWER(cudaPointerGetAttributes, (struct cudaPointerAttributes *found, void *address), memset(found, 0, sizeof *found);
       found->type = type_of(address); found->devicePointer = found->hostPointer = address)

static void copy(void *to, const void *from, size_t size, int waits)
{
    fake_copies++;
    fake_waits += waits || type_of(to) == cudaMemoryTypeUnregistered || type_of(from) == cudaMemoryTypeUnregistered;
    memmove(to, from, size);
}
ANSWER(cudaMemcpy, (void *to, const void *from, size_t size, int kind), copy(to, from, size, 1))
ANSWER(cudaMemcpyAsync, (void *to, const void *from, size_t size, int kind), copy(to, from, size, 0))
ANSWER(cudaMemsetAsync, (void *to, int value, size_t size), memset(to, value, size))

static struct cudaDeviceProp a100 = {
    .name = "a fake A100", .major = 8, .totalGlobalMem = CARD, .multiProcessorCount = 108, .warpSize = 32,
    .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64}, .maxThreadsPerMultiProcessor = 2048,
    .maxGridSize = {2147483647, 65535, 65535}, .regsPerBlock = 65536, .regsPerMultiprocessor = 65536,
    .sharedMemPerBlock = 48 << 10, .sharedMemPerBlockOptin = 163 << 10, .sharedMemPerMultiprocessor = 164 << 10,
};
ANSWER(cudaGetDeviceProperties, (struct cudaDeviceProp *card), *card = a100)

static int attribute(int name)
{
    switch (name) {
    case cudaDevAttrComputeCapabilityMajor: return a100.major;
    case cudaDevAttrMultiProcessorCount: return a100.multiProcessorCount;
    case cudaDevAttrWarpSize: return a100.warpSize;
    case cudaDevAttrMaxGridDimX: return a100.maxGridSize[0];
    case cudaDevAttrMaxSharedMemoryPerBlock: return a100.sharedMemPerBlock;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return a100.sharedMemPerBlockOptin;
    }
    return 1024;
}
ANSWER(cudaDeviceGetAttribute, (int *value, int name), *value = attribute(name))
ANSWER(cuDeviceGetAttribute, (int *value, int name), *value = attribute(name))
ANSWER(cuFuncGetAttribute, (int *value, int name), *value = name ? 0 : 1024) // 0: threads per block
ANSWER(cudaFuncGetAttributes, (struct cudaFuncAttributes *found), memset(found, 0, sizeof *found);
       found->maxThreadsPerBlock = 1024; found->binaryVersion = found->ptxVersion = 80)
ANSWER(cudaOccupancyMaxActiveBlocksPerMultiprocessor, (int *blocks), *blocks = 4)
ANSWER(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, (int *blocks), *blocks = 4)
ANSWER(cudaGetDeviceCount, (int *count), *count = 1)
ANSWER(cudaGetDevice, (int *number), *number = 0)
ANSWER(cudaDriverGetVersion, (int *version), *version = 13000)
ANSWER(cudaRuntimeGetVersion, (int *version), *version = 13000)
ANSWER(cudaDeviceGetStreamPriorityRange, (int *least, int *greatest), *least = 0; *greatest = -5)
ANSWER(cudaEventElapsedTime, (float *milliseconds), *milliseconds = 1)
ANSWER(cudaLaunchHostFunc, (void *stream, void (*function)(void *), void *data), function(data))
ANSWER(cuDevicePrimaryCtxGetState, (int number, unsigned *flags, int *active), *active = 1)
ANSWER(cuGetErrorString, (int error, const char **text), *text = "an error")
const char *cudaGetErrorString(cudaError_t error) { return "an error"; }
void *__cudaRegisterFatBinary(void *binary) { return allocate(1, 8); }
static int nothing(void) { return 0; }
ANSWER(cudaGetDriverEntryPointByVersion, (const char *name, void **function, unsigned version, long flags, int *found),
       *function = nothing; if (found) *found = 0)

// of cuBLAS and cuFFT
ANSWER(cublasLtMatmulAlgoGetHeuristic, (void *a, void *b, void *c, void *d, void *e, void *f, void *g, int h,
       void *i, int *found), *found = 1)
ANSWER(cufftCreate, (int *plan), *plan = 1)
ANSWER(cufftXtMakePlanMany, (int plan, int rank, void *a, void *b, long c, long d, int e, void *f, long g, long h,
       int i, long j, size_t *workspace), *workspace = 0)
