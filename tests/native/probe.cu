// Device functions of the sampling kernels, one value per thread, for test_noise.py.
#include "sampling/noise.cuh"
#include "sampling/row.cuh"

extern "C" __global__ void noise(const uint32_t* words, float* v, float* g, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  v[i] = idlm::word_to_uniform(words[i]);
  g[i] = idlm::uniform_to_gumbel(v[i]);
}

// counters: [count, 4], keys: [count, 2]
extern "C" __global__ void philox(const uint32_t* counters, const uint32_t* keys, uint32_t* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint32_t* c = counters + 4 * i;
  const idlm::Words w = idlm::philox4x32(c[0], c[1], c[2], c[3], keys[2 * i], keys[2 * i + 1]);
  for (int e = 0; e < 4; ++e) out[4 * i + e] = w.w[e];
}

extern "C" __global__ void divide(const float* x, const float* t, float* z, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) z[i] = idlm::Temperature(t[i]).z(x[i]);
}
