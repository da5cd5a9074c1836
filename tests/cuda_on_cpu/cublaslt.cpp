// cuBLASLt's functions that gpu_microgpt/ops/cuda/cublaslt.py calls, on the CPU.
//
// What is packed is unpacked by cuBLASLt's header alone: wrong numbers or sizes of attributes,
// impossible layouts and promises about alignment that do not hold are refused as there, or
// stricter. Products are computed in float; each algorithm sums in another order, so that results
// tell which one was used. `fake_*` are switches and counters for tests.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Type { R_32F = 0, R_16BF = 14 };
enum Compute { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 };
enum Epilogue { DEFAULT = 1, RELU = 2, RELU_AUX = 2 | 128, DRELU = 8 | 128 };
enum Order { ORDER_COL = 0, ORDER_ROW = 1 };

struct Layout {
  uint32_t type;
  int32_t order;
  uint64_t rows, cols;
  int64_t ld;
};

struct Desc {
  int32_t compute, scale, trans_a, trans_b;
  uint32_t epilogue;
  void* aux;
  int64_t aux_ld;
};

struct Preference {
  uint64_t workspace;
  uint32_t reductions;
  uint32_t align[4];  // of A, B, C, D
};

constexpr uint32_t MAGIC = 0x614c7443;

struct Algo {  // 64 bytes
  uint32_t magic, id;
  uint32_t align[4];
  uint64_t workspace;
  uint32_t epilogue, arch;
  uint64_t unused[2];
  uint64_t check;  // of all before
};
static_assert(sizeof(Algo) == 64, "as in the header");

struct Result {
  Algo algo;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Result) == 96, "as in the header");

struct Switches {
  uint64_t version = 900000;  // no real one's, so that what is kept is told apart
  int count = 3;        // algorithms offered
  int gpu = 1;          // 0: there is none
  int plain_only = 0;   // 1: no epilogue
  int unsupported = 0;  // 1: nothing at all
  uint32_t first = 1;   // the id of the first algorithm
  int failure = 0;      // what a product answers, if anything
} now;

int handle_object, matmuls, heuristics, live;
uint32_t last_id;

uint64_t sum_of(const Algo& algo) {
  uint64_t hash = 1469598103934665603u;
  const auto* bytes = reinterpret_cast<const unsigned char*>(&algo);
  for (size_t i = 0; i < offsetof(Algo, check); ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  return hash;
}

// Field `number` of a structure and its size; {nullptr, 0}: there is none.
struct Field {
  void* at;
  size_t size;
};

Field field(Desc* d, int number) {
  switch (number) {
    case 0: return {&d->compute, 4};
    case 1: return {&d->scale, 4};
    case 3: return {&d->trans_a, 4};
    case 4: return {&d->trans_b, 4};
    case 7: return {&d->epilogue, 4};
    case 11: return {&d->aux, 8};
    case 12: return {&d->aux_ld, 8};
  }
  return {nullptr, 0};
}

Field field(Layout* l, int number) {
  switch (number) {
    case 0: return {&l->type, 4};
    case 1: return {&l->order, 4};
    case 2: return {&l->rows, 8};
    case 3: return {&l->cols, 8};
    case 4: return {&l->ld, 8};
  }
  return {nullptr, 0};
}

Field field(Preference* p, int number) {
  if (number == 1) return {&p->workspace, 8};
  if (number == 3) return {&p->reductions, 4};
  if (number >= 5 && number <= 8) return {&p->align[number - 5], 4};
  return {nullptr, 0};
}

template <class T>
int set(T* to, int number, const void* value, size_t size) {
  Field f = to ? field(to, number) : Field{nullptr, 0};
  if (!f.at || !value || size != f.size) return INVALID_VALUE;
  memcpy(f.at, value, size);
  return SUCCESS;
}

template <class T>
int get(T* from, int number, void* value, size_t size, size_t* written) {
  Field f = from ? field(from, number) : Field{nullptr, 0};
  if (!f.at || (size ? !value || size != f.size : !written)) return INVALID_VALUE;
  if (size) memcpy(value, f.at, size);
  if (written) *written = f.size;
  return SUCCESS;
}

template <class T>
int create(T** out, T value) {
  *out = new T(value);
  ++live;
  return SUCCESS;
}

template <class T>
int destroy(T* gone) {
  if (!gone) return INVALID_VALUE;
  delete gone;
  --live;
  return SUCCESS;
}

size_t bytes_of(uint32_t type) { return type == R_16BF ? 2 : 4; }

bool sound(const Layout* l) {
  if (!l || (l->type != R_32F && l->type != R_16BF) || !l->rows || !l->cols) return false;
  return l->ld >= int64_t(l->order == ORDER_ROW ? l->cols : l->rows);
}

float round_bits(float x, int dropped) {  // to nearest even, without the lowest bits
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000) != 0x7f800000)
    bits += (1u << (dropped - 1)) - 1 + (bits >> dropped & 1);
  else if (bits & 0x7fffff)
    bits |= 0x400000;
  bits &= ~0u << dropped;
  memcpy(&x, &bits, 4);
  return x;
}

float load(const void* at, const Layout* l, uint64_t i, uint64_t j) {
  size_t place = l->order == ORDER_ROW ? i * l->ld + j : j * l->ld + i;
  if (l->type == R_32F) return static_cast<const float*>(at)[place];
  uint32_t bits = uint32_t(static_cast<const uint16_t*>(at)[place]) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

void store(void* at, const Layout* l, uint64_t i, uint64_t j, float x) {
  size_t place = l->order == ORDER_ROW ? i * l->ld + j : j * l->ld + i;
  if (l->type == R_32F) {
    static_cast<float*>(at)[place] = x;
    return;
  }
  x = round_bits(x, 16);
  uint32_t bits;
  memcpy(&bits, &x, 4);
  static_cast<uint16_t*>(at)[place] = uint16_t(bits >> 16);
}

struct Problem {
  const Desc* desc;
  const Layout *a, *b, *c, *d;
  uint64_t m, n, k;
};

// Whether it is one, and, where so, whether it is supported.
int understand(Problem& p) {
  const Desc* t = p.desc;
  if (!t || !sound(p.a) || !sound(p.b) || !sound(p.c) || !sound(p.d)) return INVALID_VALUE;
  if (t->trans_a < 0 || t->trans_a > 1 || t->trans_b < 0 || t->trans_b > 1) return INVALID_VALUE;
  p.m = p.d->rows, p.n = p.d->cols;
  p.k = t->trans_a ? p.a->rows : p.a->cols;
  if ((t->trans_a ? p.a->cols : p.a->rows) != p.m) return INVALID_VALUE;
  if ((t->trans_b ? p.b->cols : p.b->rows) != p.k) return INVALID_VALUE;
  if ((t->trans_b ? p.b->rows : p.b->cols) != p.n) return INVALID_VALUE;
  if (p.c->rows != p.m || p.c->cols != p.n) return INVALID_VALUE;
  bool aux = t->epilogue == RELU_AUX || t->epilogue == DRELU;
  if (aux && (t->aux_ld % 128 || t->aux_ld < int64_t(p.m))) return INVALID_VALUE;
  if (aux && (!t->aux || uintptr_t(t->aux) % 16)) return INVALID_VALUE;
  if (aux && p.d->order != ORDER_COL) return NOT_SUPPORTED;
  if (!aux && t->epilogue != DEFAULT && t->epilogue != RELU) return NOT_SUPPORTED;
  if (t->epilogue != DEFAULT && now.plain_only) return NOT_SUPPORTED;
  if (t->scale != R_32F || p.a->type != p.b->type || p.c->type != p.d->type) return NOT_SUPPORTED;
  if (p.a->type == R_32F && p.d->type != R_32F) return NOT_SUPPORTED;
  if (t->compute == COMPUTE_32F_FAST_TF32 && p.a->type != R_32F) return NOT_SUPPORTED;
  if (t->compute != COMPUTE_32F && t->compute != COMPUTE_32F_FAST_TF32) return NOT_SUPPORTED;
  return now.unsupported ? NOT_SUPPORTED : SUCCESS;
}

bool keeps(const Layout* l, const void* at, uint32_t align) {
  return align && uintptr_t(at) % align == 0 && l->ld * bytes_of(l->type) % align == 0;
}

int check(const Problem& p, const Algo* algo) {
  if (!algo || algo->magic != MAGIC || algo->check != sum_of(*algo)) return INVALID_VALUE;
  return algo->epilogue == p.desc->epilogue ? SUCCESS : NOT_SUPPORTED;
}

// op(x), packed so that the inner loop runs over what is next to each other
std::vector<float> packed(const void* at, const Layout* l, uint64_t outer, uint64_t inner,
                          bool swapped, bool tf32) {
  std::vector<float> out(outer * inner);
  for (uint64_t o = 0; o < outer; ++o)
    for (uint64_t i = 0; i < inner; ++i) {
      float x = swapped ? load(at, l, o, i) : load(at, l, i, o);
      out[o * inner + i] = tf32 ? round_bits(x, 13) : x;
    }
  return out;
}

void finish(const Problem& p, float* column, uint64_t j, float alpha, float beta, const void* c) {
  const Desc* t = p.desc;
  auto* mask = static_cast<unsigned char*>(t->aux) + j * (t->aux_ld / 8);
  for (uint64_t i = 0; i < p.m; ++i) {
    float x = alpha * column[i];
    if (beta != 0) x += beta * load(c, p.c, i, j);
    bool positive = x > 0;
    if (t->epilogue == RELU_AUX) {
      unsigned char bit = 1 << i % 8;
      mask[i / 8] = positive ? mask[i / 8] | bit : mask[i / 8] & ~bit;
    }
    if (t->epilogue == RELU || t->epilogue == RELU_AUX) x = positive ? x : 0;
    if (t->epilogue == DRELU) x = mask[i / 8] >> i % 8 & 1 ? x : 0;
    column[i] = x;
  }
}

// Algorithm `parts` sums that many parts of k on their own, then adds them.
void multiply(const Problem& p, float alpha, const void* a, const void* b, float beta,
              const void* c, void* d, uint32_t parts) {
  bool tf32 = p.desc->compute == COMPUTE_32F_FAST_TF32;
  auto left = packed(a, p.a, p.k, p.m, p.desc->trans_a, tf32);    // k rows of m numbers
  auto right = packed(b, p.b, p.n, p.k, p.desc->trans_b, tf32);  // n rows of k numbers
  std::vector<float> sum(p.m), part(p.m);
  for (uint64_t j = 0; j < p.n; ++j) {
    sum.assign(p.m, 0);
    for (uint64_t s = 0; s < parts; ++s) {
      part.assign(p.m, 0);
      for (uint64_t k = p.k * s / parts; k < p.k * (s + 1) / parts; ++k) {
        const float x = right[j * p.k + k], *row = &left[k * p.m];
        for (uint64_t i = 0; i < p.m; ++i) part[i] += row[i] * x;
      }
      for (uint64_t i = 0; i < p.m; ++i) sum[i] += part[i];
    }
    finish(p, sum.data(), j, alpha, beta, c);
    for (uint64_t i = 0; i < p.m; ++i) store(d, p.d, i, j, sum[i]);
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cublasLtCreate(void** handle) {
  if (!now.gpu) return NOT_INITIALIZED;
  *handle = &handle_object;
  return SUCCESS;
}

EXPORT int cublasLtDestroy(void* handle) {
  return handle == &handle_object ? SUCCESS : NOT_INITIALIZED;
}

EXPORT size_t cublasLtGetVersion() { return now.version; }

EXPORT const char* cublasLtGetStatusString(int status) {
  return status == NOT_INITIALIZED ? "the library was not initialized" : "not as wanted";
}

EXPORT int cublasLtMatmulDescCreate(Desc** out, int compute, int scale) {
  return create(out, Desc{compute, scale, 0, 0, DEFAULT, nullptr, 0});
}
EXPORT int cublasLtMatmulDescDestroy(Desc* gone) { return destroy(gone); }
EXPORT int cublasLtMatmulDescSetAttribute(Desc* to, int number, const void* value, size_t size) {
  return set(to, number, value, size);
}
EXPORT int cublasLtMatmulDescGetAttribute(Desc* from, int number, void* value, size_t size,
                                          size_t* written) {
  return get(from, number, value, size, written);
}

EXPORT int cublasLtMatrixLayoutCreate(Layout** out, uint32_t type, uint64_t rows, uint64_t cols,
                                      int64_t ld) {
  return create(out, Layout{type, ORDER_COL, rows, cols, ld});
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout* gone) { return destroy(gone); }
EXPORT int cublasLtMatrixLayoutSetAttribute(Layout* to, int number, const void* value,
                                            size_t size) {
  return set(to, number, value, size);
}
EXPORT int cublasLtMatrixLayoutGetAttribute(Layout* from, int number, void* value, size_t size,
                                            size_t* written) {
  return get(from, number, value, size, written);
}

EXPORT int cublasLtMatmulPreferenceCreate(Preference** out) {
  return create(out, Preference{0, 7, {256, 256, 256, 256}});
}
EXPORT int cublasLtMatmulPreferenceDestroy(Preference* gone) { return destroy(gone); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* to, int number, const void* value,
                                                size_t size) {
  return set(to, number, value, size);
}
EXPORT int cublasLtMatmulPreferenceGetAttribute(Preference* from, int number, void* value,
                                                size_t size, size_t* written) {
  return get(from, number, value, size, written);
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(void* handle, Desc* desc, Layout* a, Layout* b, Layout* c,
                                          Layout* d, Preference* preference, int wanted,
                                          Result* results, int* found) {
  if (handle != &handle_object) return NOT_INITIALIZED;
  ++heuristics;
  *found = 0;
  Problem p{desc, a, b, c, d, 0, 0, 0};
  if (!preference || wanted <= 0 || !results) return INVALID_VALUE;
  if (int status = understand(p)) return status;
  for (int i = 0; i < now.count && *found < wanted; ++i) {
    Algo algo{MAGIC, now.first + i, {}, uint64_t(i) << 20, desc->epilogue, 0, {}, 0};
    memcpy(algo.align, preference->align, sizeof algo.align);
    algo.check = sum_of(algo);
    if (algo.workspace > preference->workspace) continue;
    results[(*found)++] = Result{algo, algo.workspace, SUCCESS, 1, {}};
  }
  return *found ? SUCCESS : NOT_SUPPORTED;
}

EXPORT int cublasLtMatmulAlgoCheck(void* handle, Desc* desc, Layout* a, Layout* b, Layout* c,
                                   Layout* d, const Algo* algo, Result* result) {
  if (handle != &handle_object) return NOT_INITIALIZED;
  Problem p{desc, a, b, c, d, 0, 0, 0};
  if (int status = understand(p)) return status;
  if (int status = check(p, algo)) return status;
  result->workspace = algo->workspace;
  result->state = SUCCESS;
  return SUCCESS;
}

EXPORT int cublasLtMatmul(void* handle, Desc* desc, const float* alpha, const void* a, Layout* la,
                          const void* b, Layout* lb, const float* beta, const void* c, Layout* lc,
                          void* d, Layout* ld, const Algo* algo, void* workspace,
                          size_t workspace_bytes, void*) {
  if (handle != &handle_object) return NOT_INITIALIZED;
  Problem p{desc, la, lb, lc, ld, 0, 0, 0};
  if (now.failure) return now.failure;
  if (!alpha || !beta || !a || !b || !c || !d) return INVALID_VALUE;
  if (int status = understand(p)) return status;
  if (int status = check(p, algo)) return status;
  if (algo->workspace > workspace_bytes || (algo->workspace && !workspace)) return INVALID_VALUE;
  if (!keeps(la, a, algo->align[0]) || !keeps(lb, b, algo->align[1]) ||
      !keeps(lc, c, algo->align[2]) || !keeps(ld, d, algo->align[3]))
    return INVALID_VALUE;
  memset(workspace, 0xA5, algo->workspace);
  multiply(p, *alpha, a, b, *beta, c, d, algo->id);
  ++matmuls;
  last_id = algo->id;
  return SUCCESS;
}

EXPORT void fake_reset() {
  now = Switches();
  matmuls = heuristics = 0;
}
EXPORT void fake_version(uint64_t version) { now.version = version; }
EXPORT void fake_algorithms(uint32_t first, int count) { now.first = first, now.count = count; }
EXPORT void fake_gpu(int there) { now.gpu = there; }
EXPORT void fake_plain_only(int only) { now.plain_only = only; }
EXPORT void fake_unsupported(int nothing) { now.unsupported = nothing; }
EXPORT void fake_failure(int status) { now.failure = status; }
EXPORT int fake_matmuls() { return matmuls; }
EXPORT int fake_heuristics() { return heuristics; }
EXPORT int fake_live() { return live; }
EXPORT uint32_t fake_last_id() { return last_id; }
