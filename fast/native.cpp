// The whole decoding step on a CPU, as in tinymedusa.py: draft, verify, accept, commit. Built and called by native.py.
//
// What every function here keeps to: a number depends on its row's own tokens, never on the shape of the work. An output
// of a product is one running sum over the inputs in their order; attention adds the slots of a lane in their order;
// threads share out outputs, heads and rows, never a sum. So the logits of a node are equal in every bit to those of a
// plain step at its place, whatever tree, chunk, batch or number of threads computes it, and Medusa's tokens are plain
// decoding's. Weights stay in the checkpoint's own 16 bits (or 32) and are multiplied in float32, or are whole numbers
// of 8 bits. A greedy step leaves logits inexact that can't be the largest, see `logits`.
//
// Shapes: B rows, T new tokens of each ("nodes"), R = B T, K heads; H hidden size, V vocabulary size, L layers,
//         A attention heads, G key/value heads, D head_dim, P path length; W numbers in a vector, and slots in a block
//         of the cache. Row-major everywhere.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

typedef int64_t int64;
typedef uint64_t uint64;

// ------------------------------------------------------------------------------------------------------------ vectors
#if defined(__AVX512F__)
constexpr int W = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int W = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int W = 4, REGISTERS = 32;
#else
constexpr int W = 4, REGISTERS = 16;
#endif
#define UNROLLED _Pragma("GCC unroll 16")
typedef float Vector __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef int8_t Bytes __attribute__((vector_size(W)));

template <class T> static inline T load(const void* from) { T x; memcpy(&x, from, sizeof x); return x; }
template <class T> static inline void store(void* to, T x) { memcpy(to, &x, sizeof x); }
static inline Vector all(float x) { return x - Vector{}; }
static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
static inline int64 rounded_up(int64 n, int64 to) { return (n + to - 1) / to * to; }

template <int N> struct Lanes { typedef float type __attribute__((vector_size(4 * N))); };
template <int N> static inline float sum(typename Lanes<N>::type x) {           // halves upon halves, in registers
    if constexpr (N == 1) return x[0];
    else {
        typename Lanes<N / 2>::type lower, upper;
        memcpy(&lower, &x, sizeof lower);
        memcpy(&upper, (char*)&x + sizeof lower, sizeof upper);
        return sum<N / 2>(lower + upper);
    }
}
static inline float sum(Vector x) { return sum<W>(x); }
static inline float largest(Vector x) {
    float lane[W];
    store(lane, x);
    return *std::max_element(lane, lane + W);
}
static inline bool any(Ints mask) {
    int64 lane[W / 2], found = 0;
    store(lane, mask);
    for (int i = 0; i < W / 2; i++) found |= lane[i];
    return found;
}

// Within 2 ulp (Cephes' expf), and exactly 0 below -87: what is masked weighs nothing.
static inline Vector exp(Vector x) {
    Vector clamped = x < -87.0f ? all(-87.0f) : x > 88.0f ? all(88.0f) : x;
    Vector n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;             // rounded to a whole number
    Vector r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r
                + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
    Vector y = (p * r * r + r + 1.0f) * (Vector)exponent;
    return x < -87.0f ? Vector{} : y;
}

// Of normal positive numbers, within 2 ulp (Cephes' logf).
static inline Vector log(Vector x) {
    Bits bits = (Bits)x;
    Bits big = (Bits)((bits & 0x7fffff) > 0x3504f3);                            // a mantissa above sqrt 2: halve it
    Vector n = __builtin_convertvector((Ints)((bits >> 23) - 127 - big), Vector);
    Vector m = (Vector)((bits & 0x7fffff) | (0x3f800000 + (big << 23)));
    Vector f = m - 1.0f, z = f * f;
    Vector p = ((((((((7.0376836292e-2f * f - 1.1514610310e-1f) * f + 1.1676998740e-1f) * f - 1.2420140846e-1f) * f
                   + 1.4249322787e-1f) * f - 1.6668057665e-1f) * f + 2.0000714765e-1f) * f - 2.4999993993e-1f) * f
                + 3.3333331174e-1f) * f * z;
    return f + (p + n * -2.12194440e-4f - 0.5f * z) + n * 0.693359375f;
}

// ------------------------------------------------------------------------------------------------------------ threads
// The threads of an engine: `run` lets all of them do one job, `barrier` inside it waits for all. They spin for a
// moment, since the next phase is microseconds away, then let others work, then sleep.
struct Team {
    int threads;
    std::vector<std::thread> others;
    std::function<void(int)> job;
    std::atomic<int> round{0}, phase{0}, arrived{0};

    explicit Team(int threads) : threads(threads) {
        for (int id = 1; id < threads; id++) others.emplace_back([this, id] { serve(id); });
    }
    ~Team() {
        job = nullptr;
        start();
        for (auto& thread : others) thread.join();
    }
    void start() {
        round.fetch_add(1);
        round.notify_all();
    }
    void run(std::function<void(int)> what) {
        job = std::move(what);
        start();
        job(0);
        barrier();
    }
    void serve(int id) {
        for (int seen = 0;; seen++) {
            for (int i = 0; i < 20000 && round.load() == seen; i++) pause();
            while (round.load() == seen) round.wait(seen);
            if (!job) return;
            job(id);
            barrier();
        }
    }
    void barrier() {
        int now = phase.load();
        if (arrived.fetch_add(1) + 1 == threads) {
            arrived.store(0);
            phase.fetch_add(1);
            return;
        }
        for (int i = 0; phase.load() == now; i++) i < 4000 ? pause() : std::this_thread::yield();
    }
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
};

// One thread's part of a job.
struct Worker {
    Team& team;
    int id, threads;
    std::vector<float>& scratch;

    void barrier() { if (threads > 1) team.barrier(); }
    int64 begin(int64 n) { return n * id / threads; }
    int64 end(int64 n) { return n * (id + 1) / threads; }
    float* floats(int64 n) {
        if ((int64)scratch.size() < n) scratch.resize(n);
        return scratch.data();
    }
};

// ----------------------------------------------------------------------------------------------------------- products
// Weights are packed in blocks of inputs, a block in panels of 2 vectors of outputs, a panel input by input, so that a
// product reads memory from front to end. Two 16-bit numbers share a lane of 32 bits, or four 8-bit ones.
enum Kind { FLOAT32, BFLOAT16, FLOAT16, INT8 };
constexpr int PANEL = 2 * W;
constexpr int AHEAD = 8192;                 // bytes, see `fetch`
constexpr int INPUTS = 512;                 // inputs at a time, so that those of 8 rows stay in the first cache

struct Matrix {                             // y = W x + bias; as in native.py
    int64 kind, outputs, inputs, from_memory;       // from_memory: too much to stay in the cache, with all others
    char* data;                             // [blocks, panels, INPUTS, PANEL]; null: there is no such matrix
    float* scale;                           // [outputs] INT8: what a weight's unit is worth
    const float* bias;                      // [outputs] or null

    int64 panels() const { return (outputs + PANEL - 1) / PANEL; }
    int64 width() const { return panels() * PANEL; }                            // floats of a row of outputs
    int64 stored_inputs() const { return kind == INT8 ? rounded_up(inputs, 4) : inputs; }
    int64 bytes_per_input() const { return PANEL * (kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2); }
    int64 bytes() const { return panels() * bytes_per_input() * stored_inputs(); }
    // of a panel in the block whose first input this is, a multiple of INPUTS
    int64 panel_bytes(int64 first) const {
        return bytes_per_input() * std::min<int64>(INPUTS, stored_inputs() - first);
    }
    char* panel(int64 number, int64 first) const {
        return data + panels() * bytes_per_input() * first + number * panel_bytes(first);
    }
};

struct Float32 {
    static inline void weights(const char* at, Vector& a, Vector& b) {
        a = load<Vector>(at);
        b = load<Vector>(at + sizeof a);
    }
};
struct BFloat16 {                           // the upper half of a float32
    static inline void weights(const char* at, Vector& a, Vector& b) {
        Bits both = load<Bits>(at);
        a = (Vector)(both << 16);
        b = (Vector)(both & 0xffff0000);
    }
};
struct Float16 {                            // exponent and mantissa moved into a float32's place, 2^112 too small there
    static inline Vector upper(Bits x) { return (Vector)((x & 0x80000000) | (x >> 3 & 0x0fffe000)) * 0x1p112f; }
    static inline void weights(const char* at, Vector& a, Vector& b) {
        Bits both = load<Bits>(at);
        a = upper(both << 16);
        b = upper(both);
    }
};

// Ask for weights before they are needed. The arithmetic of many rows takes about as long as the reading: there weights
// come early to the second cache, lest one wait for the other. For one row a Zen 4's own prefetcher is fastest; a Xeon
// with AMX takes 1.5 times as long without being asked.
#if defined(__znver1__) || defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
constexpr int ASKED_FROM = 2;               // rows
#else
constexpr int ASKED_FROM = 1;
#endif
template <int M, bool wide> static inline void fetch(const char* at) {
    if constexpr (M >= (wide ? 6 : 4)) {
        __builtin_prefetch(at + AHEAD / 2);
        __builtin_prefetch(at + 2 * AHEAD, 0, 2);
    } else if constexpr (M >= ASKED_FROM) __builtin_prefetch(at + AHEAD);
}

// M rows times Q panels, n inputs of each: y += x W. x [M, INPUTS], y with `width` floats between rows.
template <class Weights, int M, int Q>
static void tile(const float* x, const char* w, int64 panel_bytes, int n, float* y, int64 width, int rows, bool first) {
    constexpr int step_bytes = std::is_same_v<Weights, Float32> ? 8 * W : 4 * W;        // of an input
    Vector total[M][Q][2] = {};             // in registers: every index below is known to the compiler
    UNROLLED for (int m = 0; m < M; m++)
        UNROLLED for (int q = 0; q < Q; q++)
            UNROLLED for (int half = 0; half < 2; half++)
                if (!first && m < rows) total[m][q][half] = load<Vector>(y + m * width + q * PANEL + half * W);
    for (int i = 0; i < n; i++, w += step_bytes, x++)
        UNROLLED for (int q = 0; q < Q; q++) {
            Vector a, b;
            Weights::weights(w + q * panel_bytes, a, b);
            UNROLLED for (int line = 0; line < step_bytes; line += 64)
                fetch<M, std::is_same_v<Weights, Float32>>(w + q * panel_bytes + line);
            UNROLLED for (int m = 0; m < M; m++) {
                total[m][q][0] += x[m * INPUTS] * a;
                total[m][q][1] += x[m * INPUTS] * b;
            }
        }
    UNROLLED for (int m = 0; m < M; m++)
        UNROLLED for (int q = 0; q < Q; q++)
            UNROLLED for (int half = 0; half < 2; half++)
                if (m < rows) store(y + m * width + q * PANEL + half * W, total[m][q][half]);
}

// In 8 bits, weights are whole numbers from 0 to 255, 128 above their value, and the inputs of a block are whole
// multiples of a step of the row's own, in two digits of 8 bits. Sums of their products are exact.
struct Digits {                             // of the inputs of a tile's rows: the upper and the lower ones
    float step[8];
    int32_t start[8][2];                    // -128 times the sum of a digit over the inputs
    int8_t digits[8][2][INPUTS];
};

// For each lane total + the sum of four bytes of weights (0 to 255) times four of x (-128 to 127).
static inline Ints dot4(Ints total, Bits weights, int32_t x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)weights, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)weights, _mm256_set1_epi32(x));
#else
    UNROLLED for (int j = 0; j < 4; j++) total += (Ints)(weights >> (8 * j) & 255) * (int32_t)(int8_t)(x >> (8 * j));
    return total;
#endif
}

template <int M>
static void tile_of_digits(const Digits& x, const char* w, int n, float* y, int64 width, int rows) {
    Ints total[M][2][2];                    // of each digit, of each half of the panel
    UNROLLED for (int m = 0; m < M; m++)
        UNROLLED for (int digit = 0; digit < 2; digit++)
            total[m][digit][0] = total[m][digit][1] = Ints{} + x.start[m][digit];
    for (int i = 0; i < n; i += 4, w += 8 * W) {
        Bits a = load<Bits>(w), b = load<Bits>(w + 4 * W);
        UNROLLED for (int line = 0; line < 8 * W; line += 64) fetch<M, false>(w + line);
        UNROLLED for (int m = 0; m < M; m++)
            UNROLLED for (int digit = 0; digit < 2; digit++) {
                int32_t four = load<int32_t>(x.digits[m][digit] + i);
                total[m][digit][0] = dot4(total[m][digit][0], a, four);
                total[m][digit][1] = dot4(total[m][digit][1], b, four);
            }
    }
    UNROLLED for (int m = 0; m < M; m++)
        UNROLLED for (int half = 0; half < 2; half++) {
            Vector upper = __builtin_convertvector(total[m][0][half], Vector);
            Vector sum = upper * 256.0f + __builtin_convertvector(total[m][1][half], Vector);
            float* to = y + m * width + half * W;
            // no choice between: the compiler must fuse this into one rounding in every build of the tile, or in none
            if (m < rows) store(to, load<Vector>(to) + sum * x.step[m]);
        }
}

// Rows of a tile: as many sums as registers can hold beside weights and inputs; 5 rows are computed as 6, 7 as 8.
constexpr int most_rows(int64 kind) { return kind == INT8 ? (REGISTERS == 32 ? 6 : 3) : REGISTERS == 32 ? 8 : 6; }
constexpr int tile_rows(int rows) { return rows <= 4 ? rows : rows <= 6 ? 6 : 8; }
// Panels at once: memory is read fastest from end to end, one panel after the other; in the cache, few rows have too
// few sums to keep the multipliers busy.
constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// Panels [begin, end) of a matrix for a tile of `rows` rows.
template <class Weights, int M>
static void panels(const float* x, const Matrix& m, int64 begin, int64 end, int64 input, int n, float* y, int rows) {
    constexpr int Q = panels_at_once(M);
    int64 bytes = m.panel_bytes(input), p = begin;
    for (; !m.from_memory && p + Q <= end; p += Q)
        tile<Weights, M, Q>(x, m.panel(p, input), bytes, n, y + p * PANEL, m.width(), rows, input == 0);
    for (; p < end; p++)
        tile<Weights, M, 1>(x, m.panel(p, input), bytes, n, y + p * PANEL, m.width(), rows, input == 0);
}

template <int M>
static void panels_of_digits(const float* x, const Matrix& m, int64 begin, int64 end, int64 input, int n, float* y,
                             int rows) {
    for (int64 p = begin; p < end; p++)
        tile_of_digits<M>(*(const Digits*)x, m.panel(p, input), n, y + p * PANEL, m.width(), rows);
}

template <int M>
static void panels_in(const float* x, const Matrix& m, int64 begin, int64 end, int64 input, int n, float* y, int rows) {
    switch (m.kind) {
        case FLOAT32: return panels<Float32, M>(x, m, begin, end, input, n, y, rows);
        case BFLOAT16: return panels<BFloat16, M>(x, m, begin, end, input, n, y, rows);
        case FLOAT16: return panels<Float16, M>(x, m, begin, end, input, n, y, rows);
        case INT8: if constexpr (M <= most_rows(INT8)) panels_of_digits<M>(x, m, begin, end, input, n, y, rows);
    }
}
static void panels_of(const float* x, const Matrix& m, int64 begin, int64 end, int64 input, int n, float* y, int rows) {
    switch (tile_rows(rows)) {
        case 1: return panels_in<1>(x, m, begin, end, input, n, y, rows);
        case 2: return panels_in<2>(x, m, begin, end, input, n, y, rows);
        case 3: return panels_in<3>(x, m, begin, end, input, n, y, rows);
        case 4: return panels_in<4>(x, m, begin, end, input, n, y, rows);
        case 6: return panels_in<6>(x, m, begin, end, input, n, y, rows);
        case 8: if constexpr (REGISTERS == 32) panels_in<8>(x, m, begin, end, input, n, y, rows);
    }
}

// What a product multiplies: rows x [R, stride] of floats, through an RMSNorm on the way where there is a gain.
struct Input {
    const float* x;
    int64 stride;
    const float* gain = nullptr;            // [inputs]
    float eps = 0;
};

static float inverse_rms(const float* x, int64 n, float eps) {
    Vector squares{};
    int64 i = 0;
    for (; i + W <= n; i += W) squares += load<Vector>(x + i) * load<Vector>(x + i);
    float total = sum(squares);
    for (; i < n; i++) total += x[i] * x[i];
    return 1 / std::sqrt(total / n + eps);
}

// Which rows a tile of a product takes: all tiles are about as large.
struct Tiles {
    int64 rows, most, count = (rows + most - 1) / most;
    int64 first(int64 tile) const { return rows * tile / count; }
    int64 size(int64 tile) const { return first(tile + 1) - first(tile); }
};

// Inputs [begin, begin + n) of a tile's rows [M, INPUTS], zeros for a row that there is not.
static void gather(const Input& in, const float* inverse, int64 rows, int64 begin, int n, float* to) {
    int M = tile_rows(rows);
    for (int64 m = 0; m < M; m++, to += INPUTS) {
        const float* from = in.x + m * in.stride + begin;
        if (m >= rows) std::fill(to, to + n, 0);
        else if (!in.gain) std::copy(from, from + n, to);
        else for (int i = 0; i < n; i++) to[i] = from[i] * inverse[m] * in.gain[begin + i];
    }
}

// The same in digits.
static void gather_digits(const Input& in, const float* inverse, int64 rows, int64 begin, int n, Digits& to) {
    float x[8 * INPUTS];
    gather(in, inverse, rows, begin, n, x);
    for (int64 m = 0; m < tile_rows(rows); m++) {
        float* row = x + m * INPUTS;
        int padded = rounded_up(n, W);
        std::fill(row + n, row + padded, 0);
        Vector most = all(1e-30f);
        for (int i = 0; i < padded; i += W) {
            Vector v = load<Vector>(row + i);
            most = larger(most, larger(v, -v));
        }
        to.step[m] = largest(most) / 32639;                                     // 127 * 256 + 127
        Ints sums[2] = {};
        for (int i = 0; i < padded; i += W) {
            Vector steps = load<Vector>(row + i) / to.step[m] + 32768.5f;       // rounded, whatever its sign
            Ints value = __builtin_convertvector(steps, Ints) - 32768, lower = value << 24 >> 24;
            Ints digit[2] = {(value - lower) >> 8, lower};
            for (int d = 0; d < 2; d++) {
                sums[d] += digit[d];
                store(to.digits[m][d] + i, __builtin_convertvector(digit[d], Bytes));
            }
        }
        for (int d = 0; d < 2; d++) {
            to.start[m][d] = 0;
            for (int lane = 0; lane < W; lane++) to.start[m][d] -= 128 * sums[d][lane];
        }
    }
}

// y[j] [R, width of matrix j] = matrix j times the input, for matrices of as many inputs: this worker's share of each
// one's panels, `begin(panels)` to `end(panels)`. Nobody waits here.
static void product(Worker& worker, Input in, int64 rows, std::initializer_list<const Matrix*> matrices,
                    std::initializer_list<float*> outputs) {
    int64 inputs = (*matrices.begin())->inputs, kind = (*matrices.begin())->kind;
    Tiles tiles{rows, most_rows(kind)};
    constexpr int64 size = 8 * INPUTS;                                          // floats of a tile, more than enough
    float* x = worker.floats(tiles.count * size + rows), *inverse = x + tiles.count * size;
    for (int64 r = 0; in.gain && r < rows; r++) inverse[r] = inverse_rms(in.x + r * in.stride, inputs, in.eps);
    auto into = outputs.begin();
    for (const Matrix* m : matrices) {                                          // digits add to what is there
        float* y = *into++;
        int64 begin = worker.begin(m->panels()) * PANEL, end = worker.end(m->panels()) * PANEL;
        for (int64 r = 0; kind == INT8 && r < rows; r++, y += m->width()) std::fill(y + begin, y + end, 0);
    }
    for (int64 input = 0; input < inputs; input += INPUTS) {
        int n = std::min<int64>(INPUTS, inputs - input);
        for (int64 t = 0; t < tiles.count; t++) {
            Input rows_of_tile{in.x + tiles.first(t) * in.stride, in.stride, in.gain, in.eps};
            float *to = x + t * size, *norm = inverse + tiles.first(t);
            if (kind == INT8) gather_digits(rows_of_tile, norm, tiles.size(t), input, n, *(Digits*)to);
            else gather(rows_of_tile, norm, tiles.size(t), input, n, to);
        }
        auto output = outputs.begin();
        for (const Matrix* m : matrices) {
            float* y = *output++;
            int64 end = worker.end(m->panels()), some = tiles.count > 1 ? 4 : end;
            for (int64 p = worker.begin(m->panels()); p < end; p += some)       // their weights come from memory once
                for (int64 t = 0; t < tiles.count; t++)
                    panels_of(x + t * size, *m, p, std::min(p + some, end), input, n,
                              y + tiles.first(t) * m->width(), tiles.size(t));
        }
    }
    auto output = outputs.begin();
    for (const Matrix* m : matrices) {                                          // scale and bias, where there are any
        float* y = *output++;
        int64 begin = worker.begin(m->panels()) * PANEL, end = std::min(worker.end(m->panels()) * PANEL, m->outputs);
        for (int64 r = 0; r < rows; r++, y += m->width()) {
            if (m->scale) for (int64 o = begin; o < end; o++) y[o] *= m->scale[o];
            if (m->bias) for (int64 o = begin; o < end; o++) y[o] += m->bias[o];
        }
    }
}

// Rows [first, first + rows) of a matrix into its panels, from row-major float32 or the kind's own 16 bits.
static void pack(Matrix& m, int64 first, int64 rows, const void* source) {
    for (int64 r = 0; r < rows; r++) {
        int64 o = first + r, half = o % PANEL / W, lane = o % W;
        const float* wide = (const float*)source + r * m.inputs;
        const uint16_t* narrow = (const uint16_t*)source + r * m.inputs;
        float unit = 1;
        if (m.kind == INT8) {               // the nearest of 255 values symmetric about 0, as in int8.py
            float most = 0;
            for (int64 i = 0; i < m.inputs; i++) most = std::max(most, std::fabs(wide[i]));
            unit = std::max(most / 127, 1e-12f);
            m.scale[o] = unit;
        }
        for (int64 i = 0; i < m.inputs; i++) {
            char* panel = m.panel(o / PANEL, i / INPUTS * INPUTS);
            int64 j = i % INPUTS;
            if (m.kind == FLOAT32) ((float*)panel)[j * PANEL + half * W + lane] = wide[i];
            else if (m.kind != INT8) ((uint16_t*)panel)[(j * W + lane) * 2 + half] = narrow[i];
            else {
                float value = std::min(127.0f, std::max(-127.0f, std::nearbyint(wide[i] / unit)));
                panel[((j / 4 * 2 + half) * W + lane) * 4 + j % 4] = (char)(128 + (int)value);
            }
        }
    }
}

static float widened(int64 kind, const void* from, int64 i) {
    if (kind == FLOAT32) return ((const float*)from)[i];
    Bits bits = Bits{} + ((uint32_t)((const uint16_t*)from)[i] << 16);
    return kind == BFLOAT16 ? ((Vector)bits)[0] : Float16::upper(bits)[0];
}

// One row of a packed matrix, as floats.
static void unpacked_row(const Matrix& m, int64 o, float* to) {
    int64 half = o % PANEL / W, lane = o % W;
    for (int64 first = 0; first < m.inputs; first += INPUTS) {
        const char* panel = m.panel(o / PANEL, first);
        for (int64 j = 0; j < std::min<int64>(INPUTS, m.inputs - first); j++) {
            float& value = to[first + j];
            if (m.kind == FLOAT32) value = ((const float*)panel)[j * PANEL + half * W + lane];
            else if (m.kind != INT8) value = widened(m.kind, panel, (j * W + lane) * 2 + half);
            else value = ((uint8_t)panel[((j / 4 * 2 + half) * W + lane) * 4 + j % 4] - 128) * m.scale[o];
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- model
// As in native.py, which fills these in.
struct Layer {
    const float* input_norm;                // [H]
    Matrix q, k, v, o;
    const float* post_norm;                 // [H]
    Matrix gate, up, down;
};
struct Model {
    int64 hidden, heads, kv_heads, head_dim, layers;
    double eps;
    const Layer* layer;
    const float* norm;                      // [H]
    Matrix lm_head, screen;                 // screen: the lm_head in 8 bits too, or no matrix
    const float* screen_error;              // [width of screen], see `logits`
    int64 table_kind;
    const void* table;                      // [V, H] embeddings; null: lm_head's rows
    const float *cos, *sin;                 // [positions, D] of rotary_table
};
struct Block { Matrix up, down; };          // x + down(silu(up z)), or without `down` x + silu(up z)
struct Heads {
    int64 count, layers, recent;
    int64 seen;                             // tokens: 0: none, 1: the root, 2: all before the guess (Hydra)
    int64 trunk_width, draft_size;
    Block trunk;
    const Block* block;                     // [count, layers]
    const Matrix* vocabulary;               // [count]
    const int64* token_map;                 // [draft_size] or null
};
struct Tree {                               // N nodes by depth, the root first
    int64 nodes, deepest;
    const int64 *parent, *depth, *rank;     // [N]
};
struct Sampling { double temperature; int64 top_k; double top_p, min_p; };
struct State {                              // tinymedusa.State; everything [B] but the cache and recent_hidden
    float* cache;                           // [L, B, 2, G, blocks, D, W], strides of L and B in floats
    int64 layer_stride, row_stride, blocks;
    int64 rows;
    int64 *length, *token;
    float* recent_hidden;                   // [B, recent, H]
    int64 *emitted, *remaining, *seed;
    int64 recent;
};

// Floats on cache lines, as many as were ever needed.
struct Buffer {
    std::vector<float> memory;
    float* data = nullptr;

    void fit(int64 n) {
        if ((int64)memory.size() < n + 16) memory.resize(n + 16);
        data = (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
    }
    operator float*() const { return data; }
};

struct Engine {
    Model model;
    std::unique_ptr<Team> team;
    std::vector<std::vector<float>> scratch;
    int64 rows, T;                          // of the newest forward: B, and the nodes of a row
    Buffer x, y, q, k, v, attended, gate, up, hidden, logits;                   // of R nodes
    Buffer nodes;                           // keys and values of a tree's nodes, see Slots
    Buffer least;                           // [R, threads], see `logits`
    Buffer input, start, drafted;           // of the heads
    std::vector<int64> ids, guesses, path;  // [B, N], [rows of a head, ranks], [B, P]
    double clock[5];
    std::vector<double> by_itself;          // seconds of a step by its nodes, of all rows, on one thread; see `judge`
    int alone = 0, pause = 16, waited = 0;

    explicit Engine(const Model& m) : model(m) { set_threads(1); }
    void set_threads(int threads) {
        team = std::make_unique<Team>(threads);
        scratch.resize(threads);
        by_itself.clear();
        alone = waited = 0, pause = 16;
    }
    // A thread that shares its core with something else keeps all others waiting, for milliseconds. Where two steps in
    // a row took longer than one thread needs, it goes on alone for a while, twice as long each time.
    void judge(int64 nodes, double seconds) {
        if ((int64)by_itself.size() <= nodes) by_itself.resize(nodes + 1);
        double& one = by_itself[nodes];
        if (one == 0) alone = 2;                                                // not known yet
        if (alone > 0) {
            one = one == 0 ? 1e9 : std::min(seconds, one * 1.01);               // the context grows
            alone--;
            return;
        }
        waited = seconds > 1.2 * one ? waited + 1 : 0;
        pause = std::max(16, pause - (waited == 0));
        if (waited == 2) waited = 0, alone = pause = std::min(2 * pause, 4096);
    }
    int64 node_stride() const { return 2 * model.kv_heads * node_blocks() * model.head_dim * W; }
    int64 node_blocks() const { return rounded_up(std::max<int64>(T, 1), 4 * W) / W; }

    void run(const std::function<void(Worker&)>& job) {
        int threads = alone > 0 ? 1 : team->threads;
        auto work = [&](int id) {
            Worker worker{*team, id, threads, scratch[id]};
            job(worker);
        };
        if (threads == 1) work(0);
        else team->run(work);
    }
    void reserve(int64 B, int64 nodes_of_a_row, bool is_tree) {
        rows = B, T = nodes_of_a_row;
        int64 R = B * T;
        const Layer& l = model.layer[0];
        x.fit(R * model.hidden), y.fit(R * l.o.width()), hidden.fit(R * model.hidden);
        q.fit(R * l.q.width()), k.fit(R * l.k.width()), v.fit(R * l.v.width());
        attended.fit(R * model.heads * model.head_dim), gate.fit(R * l.gate.width()), up.fit(R * l.up.width());
        if (is_tree) nodes.fit(model.layers * B * node_stride());
    }
};

// ---------------------------------------------------------------------------------------------------------- attention
// The cache of a row and layer: keys and values [2, G, blocks, D, W], the W slots of a block side by side, so that one
// vector is one dimension of W slots, whatever D is. Nodes of a tree other than its root are kept apart in such blocks
// (slot n: node n) until they are accepted. A node sees the committed slots and its ancestors *in the lanes that they
// would have if they were committed*; so no mask is needed, and nothing rejected ever is in the cache.
struct Slots {
    float* keys;                            // [G, blocks, D, W]
    int64 blocks, D, G;

    float* key(int64 g) const { return keys + g * blocks * D * W; }
    float* value(int64 g) const { return keys + (G + g) * blocks * D * W; }
    static int64 offset(int64 slot, int64 D) { return slot / W * D * W + slot % W; }    // of dimension 0
};
static Slots cache_of(Engine& e, State& s, int64 layer, int64 row) {
    return {s.cache + layer * s.layer_stride + row * s.row_stride, s.blocks, e.model.head_dim, e.model.kv_heads};
}
static Slots nodes_of(Engine& e, int64 layer, int64 row) {
    return {e.nodes + (layer * e.rows + row) * e.node_stride(), e.node_blocks(), e.model.head_dim, e.model.kv_heads};
}

// Scores of C R: R queries against `blocks` blocks of keys (rounded up to C): [R, stride].
template <int R>
static void scores(const float* const* query, const float* keys, int64 blocks, int64 D, float* out, int64 stride) {
    constexpr int C = 4 / R > 1 ? 4 / R : 2;
    for (int64 block = 0; block < blocks; block += C, keys += C * D * W) {
        Vector total[R][C] = {};
        for (int64 d = 0; d < D; d++)
            for (int c = 0; c < C; c++) {
                Vector key = load<Vector>(keys + (c * D + d) * W);
                for (int r = 0; r < R; r++) total[r][c] += query[r][d] * key;
            }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) store(out + r * stride + (block + c) * W, total[r][c]);
    }
}

// Dimensions [d, d + N) of the sums of values, weighted, lane by lane: out [R, D W].
template <int R, int N>
static void weighted(const float* weights, int64 stride, const float* values, int64 blocks, int64 D, int64 d,
                     float* out) {
    Vector total[R][N] = {};
    for (int64 block = 0; block < blocks; block++)
        for (int n = 0; n < N; n++) {
            Vector value = load<Vector>(values + (block * D + d + n) * W);
            for (int r = 0; r < R; r++) total[r][n] += load<Vector>(weights + r * stride + block * W) * value;
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(out + (r * D + d + n) * W, total[r][n]);
}

// Scores become weights, not yet divided by their sum, which is returned. n: a multiple of W.
static float softmax(float* w, int64 n) {
    Vector top = all(-1e30f), total{};
    for (int64 i = 0; i < n; i += W) top = larger(load<Vector>(w + i), top);
    top = all(largest(top));
    for (int64 i = 0; i < n; i += W) {
        Vector p = exp(load<Vector>(w + i) - top);
        store(w + i, p);
        total += p;
    }
    return sum(total);
}

// R nodes of a row, from `node` on, one attention head.
template <int R>
static void attend(Engine& e, State& s, const Tree* tree, float* scratch, int64 layer, int64 row, int64 node,
                   int64 head) {
    int64 D = e.model.head_dim, A = e.model.heads, g = head / (A / e.model.kv_heads);
    bool chain = !tree;
    Slots cache = cache_of(e, s, layer, row);
    int64 length[R], slots[R], most = 0;
    const float* query[R];
    for (int r = 0; r < R; r++) {
        length[r] = s.length[row] + 1 + (chain ? node + r : 0);                 // what is in the cache and seen
        slots[r] = length[r] + (chain ? 0 : tree->depth[node + r]);             // one more than needed does no harm
        most = std::max(most, slots[r]);
        query[r] = e.q + (row * e.T + node + r) * e.model.layer[0].q.width() + head * D;
    }
    int64 committed = (*std::max_element(length, length + R) + W - 1) / W, blocks = rounded_up((most + W - 1) / W, 4);
    int64 stride = blocks * W, node_stride = e.node_blocks() * W;
    float *weight = scratch, *own = weight + R * stride, *total = own + R * node_stride;
    scores<R>(query, cache.key(g), committed, D, weight, stride);
    for (int r = 0; r < R; r++) std::fill(weight + r * stride + length[r], weight + (r + 1) * stride, -1e30f);
    if (!chain) {                                                               // the ancestors, behind the root
        scores<R>(query, nodes_of(e, layer, row).key(g), (e.T + W - 1) / W, D, own, node_stride);
        for (int r = 0; r < R; r++)
            for (int64 n = node + r; n; n = tree->parent[n])
                weight[r * stride + length[r] - 1 + tree->depth[n]] = own[r * node_stride + n];
    }
    float sums[R];
    for (int r = 0; r < R; r++) sums[r] = softmax(weight + r * stride, stride);
    // weights of the ancestors' slots must meet their own values, not what is in the cache there
    float later[R][64];
    for (int r = 0; r < R && !chain; r++)
        for (int64 n = node + r; n; n = tree->parent[n]) {
            float& w = weight[r * stride + length[r] - 1 + tree->depth[n]];
            later[r][tree->depth[n]] = w;
            w = 0;
        }
    int64 d = 0;
    for (; d + 4 <= D; d += 4) weighted<R, 4>(weight, stride, cache.value(g), committed, D, d, total);
    for (; d < D; d += 2) weighted<R, 2>(weight, stride, cache.value(g), committed, D, d, total);
    for (int r = 0; r < R; r++) {
        float* lanes = total + r * D * W;
        int64 way[64], depth = 0;
        for (int64 n = chain ? 0 : node + r; n; n = tree->parent[n]) way[depth++] = n;
        for (int64 j = 1; j <= depth; j++) {                                    // from the top down: by slot
            const float* value = nodes_of(e, layer, row).value(g) + Slots::offset(way[depth - j], D);
            float* lane = lanes + (length[r] - 1 + j) % W;
            for (int64 i = 0; i < D; i++) lane[i * W] += later[r][j] * value[i * W];
        }
        float* out = e.attended + ((row * e.T + node + r) * A + head) * D;
        for (int64 i = 0; i < D; i++) out[i] = sum(load<Vector>(lanes + i * W)) / sums[r];
    }
}

static void attention(Worker& worker, Engine& e, State& s, const Tree* tree, int64 layer) {
    int64 units = e.rows * e.model.heads, D = e.model.head_dim, longest = 0;
    for (int64 row = 0; row < e.rows; row++) longest = std::max(longest, s.length[row]);
    int64 most = rounded_up(longest + e.T + 64, 4 * W) + e.node_blocks() * W;
    float* scratch = worker.floats(4 * (most + D * W));
    for (int64 u = worker.begin(units); u < worker.end(units); u++) {
        int64 row = u / e.model.heads, head = u % e.model.heads;
        for (int64 node = 0; node < e.T;) {
            int64 left = e.T - node;
            if (left >= 4) attend<4>(e, s, tree, scratch, layer, row, node, head), node += 4;
            else if (left >= 2) attend<2>(e, s, tree, scratch, layer, row, node, head), node += 2;
            else attend<1>(e, s, tree, scratch, layer, row, node, head), node++;
        }
    }
}

// Rotate queries and keys by their positions; put keys and values into the cache (the chain) or among the nodes. A unit
// is a group's key or one of its queries, of all nodes: their keys share cache lines, so one thread writes them.
static void rotate_and_store(Worker& worker, Engine& e, State& s, const Tree* tree, const int64* depth, int64 layer) {
    const Model& m = e.model;
    int64 D = m.head_dim, half = D / 2, R = e.rows * e.T, group = m.heads / m.kv_heads, n = R * (m.heads + m.kv_heads);
    float scale = 1 / std::sqrt((float)D), rotated[D];
    for (int64 i = worker.begin(n); i < worker.end(n); i++) {
        int64 unit = i / R, r = i % R, row = r / e.T, node = r % e.T;
        int64 g = unit / (group + 1), head = g * group + unit % (group + 1) - 1;
        bool is_key = unit % (group + 1) == 0;
        int64 position = s.length[row] + depth[node];
        const float *cos = m.cos + position * D, *sin = m.sin + position * D;
        float* x = is_key ? e.k + r * m.layer[layer].k.width() + g * D : e.q + r * m.layer[layer].q.width() + head * D;
        for (int64 d = 0; d < half; d++) {
            rotated[d] = x[d] * cos[d] + x[d + half] * sin[d];                  // this half of sin is negated
            rotated[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
        }
        if (!is_key) {
            for (int64 d = 0; d < D; d++) x[d] = rotated[d] * scale;
            continue;
        }
        bool chain = !tree || node == 0;
        Slots to = chain ? cache_of(e, s, layer, row) : nodes_of(e, layer, row);
        int64 offset = Slots::offset(chain ? s.length[row] + node : node, D);
        const float* value = e.v + r * m.layer[layer].v.width() + g * D;
        float *keys = to.key(g) + offset, *values = to.value(g) + offset;
        for (int64 d = 0; d < D; d++) keys[d * W] = rotated[d], values[d * W] = value[d];
    }
}

// ------------------------------------------------------------------------------------------------------------ forward
static void add(Worker& worker, float* x, const float* y, const Matrix& m, int64 rows) {    // own outputs: x += y
    int64 from = worker.begin(m.panels()) * PANEL, to = std::min(worker.end(m.panels()) * PANEL, m.outputs);
    for (int64 r = 0; r < rows; r++)
        for (int64 o = from; o < to; o++) x[r * m.outputs + o] += y[r * m.width() + o];
}

static void silu(Worker& worker, float* x, const float* times, const Matrix& m, int64 rows) {  // own outputs, in place
    int64 from = worker.begin(m.panels()) * PANEL, to = worker.end(m.panels()) * PANEL;
    for (int64 r = 0; r < rows; r++)
        for (int64 o = from; o < to; o += W) {
            float* at = x + r * m.width() + o;
            Vector g = load<Vector>(at), y = g / (1.0f + exp(-g));
            store(at, times ? y * load<Vector>(times + r * m.width() + o) : y);
        }
}

static void embed(const Model& m, int64 id, float* to) {
    if (!m.table) return unpacked_row(m.lm_head, id, to);
    for (int64 i = 0; i < m.hidden; i++) to[i] = widened(m.table_kind, m.table, id * m.hidden + i);
}

// All nodes of all rows through the layers: ids [B, T], depth [T] → hidden [B, T, H].
static void forward(Worker& worker, Engine& e, State& s, const Tree* tree, const int64* ids, const int64* depth) {
    const Model& m = e.model;
    int64 R = e.rows * e.T, H = m.hidden, width = m.heads * m.head_dim;
    float eps = m.eps;
    for (int64 r = worker.begin(R); r < worker.end(R); r++) embed(m, ids[r], e.x + r * H);
    worker.barrier();
    for (int64 i = 0; i < m.layers; i++) {
        const Layer& l = m.layer[i];
        product(worker, {e.x, H, l.input_norm, eps}, R, {&l.q, &l.k, &l.v}, {e.q, e.k, e.v});
        worker.barrier();
        rotate_and_store(worker, e, s, tree, depth, i);
        worker.barrier();
        attention(worker, e, s, tree, i);
        worker.barrier();
        product(worker, {e.attended, width}, R, {&l.o}, {e.y});
        add(worker, e.x, e.y, l.o, R);
        worker.barrier();
        product(worker, {e.x, H, l.post_norm, eps}, R, {&l.gate, &l.up}, {e.gate, e.up});
        silu(worker, e.gate, e.up, l.gate, R);
        worker.barrier();
        product(worker, {e.gate, l.gate.width()}, R, {&l.down}, {e.y});
        add(worker, e.x, e.y, l.down, R);
        worker.barrier();
    }
    for (int64 r = worker.begin(R); r < worker.end(R); r++) {
        float norm = inverse_rms(e.x + r * H, H, eps);
        for (int64 i = 0; i < H; i++) e.hidden[r * H + i] = e.x[r * H + i] * norm * m.norm[i];
    }
    worker.barrier();
}

// The logits of R nodes. Where only the largest of a node matters, the lm_head in 8 bits gives each logit to within
// |hidden| times its output's `screen_error` (Screen in native.py says why). Only panels that may hold the largest are
// computed from the weights themselves; the others keep their 8-bit logits, which are certainly smaller.
static void logits(Worker& worker, Engine& e, int64 R, bool greedy) {
    const Model& m = e.model;
    int64 H = m.hidden, width = m.lm_head.width(), begin = worker.begin(width / PANEL), end = worker.end(width / PANEL);
    if (!greedy || !m.screen.data) return product(worker, {e.hidden, H}, R, {&m.lm_head}, {e.logits});
    product(worker, {e.hidden, H}, R, {&m.screen}, {e.logits});
    float *norm = worker.floats(2 * R), *least = norm + R;                      // the largest logit is at least `least`
    for (int64 r = 0; r < R; r++) {
        float *y = e.logits + r * width, rms = 1 / inverse_rms(e.hidden + r * H, H, 0);
        if (!(rms > 1e-15f && rms < 1e15f))                                     // its squares may under- or overflow
            return product(worker, {e.hidden, H}, R, {&m.lm_head}, {e.logits});
        norm[r] = std::sqrt((float)H) * rms;
        if (end * PANEL > m.lm_head.outputs) std::fill(y + m.lm_head.outputs, y + width, -1e30f);
        Vector most = all(-1e30f);
        for (int64 o = begin * PANEL; o < end * PANEL; o += W)
            most = larger(most, load<Vector>(y + o) - norm[r] * load<Vector>(m.screen_error + o));
        e.least[r * worker.threads + worker.id] = largest(most);
    }
    worker.barrier();
    for (int64 r = 0; r < R; r++) {
        const float* of_workers = e.least + r * worker.threads;
        least[r] = *std::max_element(of_workers, of_workers + worker.threads);
    }
    for (int64 p = begin; p < end; p++)
        for (int64 r = 0; r < R; r++) {
            float* y = e.logits + r * width;
            Vector most = all(-1e30f);
            for (int64 o = p * PANEL; o < (p + 1) * PANEL; o += W)
                most = larger(most, load<Vector>(y + o) + norm[r] * load<Vector>(m.screen_error + o));
            if (!any(most >= least[r])) continue;
            for (int64 i = 0; i < H; i += INPUTS)
                panels_of(e.hidden + r * H + i, m.lm_head, p, p + 1, i, std::min<int64>(INPUTS, H - i), y, 1);
        }
}

// ----------------------------------------------------------------------------------------------------------- sampling
constexpr uint64 GOLDEN = 0x9E3779B97F4A7C15;
static inline uint64 mix64(uint64 z) {      // SplitMix64's output function
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}
static uint64 noise_key(int64 seed, int64 position) {
    return mix64(mix64((uint64)seed) + GOLDEN * (uint64)(position + 1));
}

// v of gumbel_noise for W tokens.
static inline Vector uniforms(uint64 key, const int64* token) {
    uint32_t number[W];
    for (int i = 0; i < W; i++) number[i] = mix64(key + GOLDEN * (uint64)(token[i] + 1)) >> 32;
    Vector v = (__builtin_convertvector(load<Bits>(number), Vector) + 0.5f) * 0x1p-32f;
    return v > 1 - 0x1p-24f ? all(1 - 0x1p-24f) : v;
}
static inline Vector gumbel(Vector v) {     // -log(-log1p(-v)); log1p by Kahan's correction of the rounding in 1 - v
    Vector u = 1.0f - v, off = u - 1.0f;
    Vector inner = u == 1.0f ? v : log(u) * (v / off);
    return -log(inner);
}

// The `ranks` best of n tokens, best first, of equal ones the lower ids: by logit, or at a temperature T by
// logit / T + noise of the token's id.
struct Best {
    std::vector<float> value;
    std::vector<int64> id;

    void consider(float v, int64 i) {
        size_t at = value.size() - 1;
        if (!(v > value[at])) return;
        for (; at && v > value[at - 1]; at--) value[at] = value[at - 1], id[at] = id[at - 1];
        value[at] = v, id[at] = i;
    }
    void find(const float* logits, int64 n, int64 ranks, double temperature, uint64 key, const int64* token_map) {
        value.assign(ranks, -std::numeric_limits<float>::infinity());
        id.assign(ranks, 0);
        Vector top = all(-1e30f), T = all(std::max(temperature, 1e-30));
        int64 whole = n / W * W;
        for (int64 i = 0; temperature > 0 && i < whole; i += W) top = larger(load<Vector>(logits + i), top);
        float most = largest(top);
        for (int64 i = whole; i < n; i++) most = std::max(most, logits[i]);
        for (int64 i = 0; i < n; i += W) {
            int lanes = std::min<int64>(W, n - i);
            float tail[W];
            int64 token[W];
            std::fill(tail, tail + W, -std::numeric_limits<float>::infinity());
            if (lanes < W) memcpy(tail, logits + i, lanes * sizeof(float));
            Vector x = load<Vector>(lanes < W ? tail : logits + i);
            if (temperature > 0) {
                x = (x - most) / T;
                if (!any(x + 23.2f > value.back())) continue;                   // the largest noise there is
                for (int j = 0; j < W; j++) token[j] = token_map ? token_map[std::min(i + j, n - 1)] : i + j;
                Vector v = uniforms(key, token);
                // noise is below -log(v), and that below ln 2 times the exponent's distance from 2^1
                Vector bound = __builtin_convertvector((Ints)(127 - ((Bits)v >> 23)), Vector) * 0.69314719f;
                if (!any(x + bound > value.back())) continue;
                x += gumbel(v);
            }
            if (!any(x > value.back())) continue;
            for (int j = 0; j < lanes; j++) consider(x[j], i + j);
        }
    }
};

// tinymedusa.sample of one row of logits: argmax(logits / T + noise) over what top-k, top-p and min-p leave.
static int64 sample(const float* logits, int64 n, const Sampling& s, uint64 key) {
    Best best;
    bool top_k = s.top_k > 0 && s.top_k < n;
    if (s.temperature == 0 || (!top_k && s.top_p >= 1 && s.min_p <= 0)) {
        best.find(logits, n, 1, s.temperature, key, nullptr);
        return best.id[0];
    }
    struct Token { float z; int64 id; };
    std::vector<Token> kept;
    float most = *std::max_element(logits, logits + n), T = std::max(s.temperature, 1e-30);
    auto more_likely = [](const Token& a, const Token& b) { return a.z > b.z || (a.z == b.z && a.id < b.id); };
    for (int64 i = 0; i < n; i++) kept.push_back({(logits[i] - most) / T, i});
    if (top_k) {
        std::nth_element(kept.begin(), kept.begin() + s.top_k, kept.end(), more_likely);
        kept.resize(s.top_k);
    }
    if (s.top_p < 1) {
        double total = 0, mass = 0;
        for (Token& t : kept) total += std::exp((double)t.z);
        float least = 0;                    // sort only those that the nucleus may need: more, until they suffice
        auto end = kept.begin();
        while (mass < s.top_p * total && end != kept.end() && least > -1e30f) {
            least = least * 2 - 4, mass = 0;
            end = std::partition(kept.begin(), kept.end(), [&](const Token& t) { return t.z > least; });
            for (auto t = kept.begin(); t != end; t++) mass += std::exp((double)t->z);
        }
        std::sort(kept.begin(), end, more_likely);
        double before = 0;
        int64 count = 0;
        for (; count < end - kept.begin() && before < s.top_p * total; count++)
            before += std::exp((double)kept[count].z);
        kept.resize(std::max<int64>(count, 1));
    }
    if (s.min_p > 0) {
        float least = std::log(s.min_p);
        std::erase_if(kept, [&](const Token& t) { return t.z < least; });
    }
    std::sort(kept.begin(), kept.end(), [](const Token& a, const Token& b) { return a.id < b.id; });
    float highest = -std::numeric_limits<float>::infinity();
    int64 chosen = kept[0].id;
    for (Token& t : kept) {
        int64 ids[W];
        std::fill(ids, ids + W, t.id);
        float perturbed = t.z + gumbel(uniforms(key, ids))[0];
        if (perturbed > highest) highest = perturbed, chosen = t.id;
    }
    return chosen;
}

// -------------------------------------------------------------------------------------------------------------- draft
static void embed_scaled(const Model& m, int64 id, float* to) {                 // to RMS 1
    embed(m, id, to);
    float norm = inverse_rms(to, m.hidden, 1e-6f);
    for (int64 i = 0; i < m.hidden; i++) to[i] *= norm;
}

// x += what a block adds to it: x [rows, H], z [rows, stride].
static void block(Worker& worker, Engine& e, const Block& b, float* x, const float* z, int64 stride, int64 rows) {
    product(worker, {z, stride}, rows, {&b.up}, {e.up});
    silu(worker, e.up, nullptr, b.up, rows);
    worker.barrier();
    if (b.down.data) {
        product(worker, {e.up, b.up.width()}, rows, {&b.down}, {e.y});
        add(worker, x, e.y, b.down, rows);
    } else add(worker, x, e.up, b.up, rows);
    worker.barrier();
}

// Candidates for every node: ids [B, N], the root first. Head k guesses what the nodes of depth k - 1 will sample, so
// it ranks with their position's noise. Hydra's sees the drafts before its guess and runs once for each of those nodes.
static void draft(Worker& worker, Engine& e, State& s, const Heads& h, const Tree& tree, const Sampling& sampling) {
    const Model& m = e.model;
    int64 B = s.rows, N = tree.nodes, H = m.hidden, K = h.count, ranks = 1;
    bool trunk = h.trunk_width > 0;
    int64 first = trunk ? 1 : 0, context = h.recent * H;    // tokens from `first` on go to the heads
    int64 root_size = trunk && h.seen ? H : 0, most_inputs = std::max(context + H, H) + tree.deepest * H;
    for (int64 n = 1; n < N; n++) ranks = std::max(ranks, tree.rank[n] + 1);
    if (worker.id == 0) {
        e.ids.assign(B * N, 0);
        e.guesses.assign(B * N * ranks, 0);
        int64 wide = std::max<int64>(trunk ? h.trunk.up.width() : 0, h.block[0].up.width());
        e.up.fit(B * N * wide), e.y.fit(B * N * std::max(H + PANEL, trunk ? h.trunk.down.width() : 0));
        e.input.fit(B * N * most_inputs), e.start.fit(B * (2 * N + K) * H);
        e.drafted.fit(B * N * h.vocabulary[0].width());
        for (int64 b = 0; b < B; b++) e.ids[b * N] = s.token[b];
    }
    worker.barrier();
    float *input = e.input, *x = e.start, *context_x = x + B * N * H, *logits = e.drafted;
    float* known = context_x + B * K * H;   // embeddings of the drafts that heads see: [B, N, H]
    if (trunk) {                            // a shared first block: context_x [B, K H], all heads' starts
        for (int64 b = worker.begin(B); b < worker.end(B); b++) {
            float* z = input + b * (context + root_size);
            memcpy(z, s.recent_hidden + b * context, context * sizeof(float));
            if (root_size) embed_scaled(m, s.token[b], z + context);
            for (int64 k = 0; k < K; k++) memcpy(context_x + (b * K + k) * H, z + context - H, H * sizeof(float));
        }
        worker.barrier();
        block(worker, e, h.trunk, context_x, input, context + root_size, B);
    }
    int64 begin = 1, end = 1;               // nodes [begin, end) are of depth k
    std::vector<int64> parents;             // what they hang on, as far as the heads tell them apart
    for (int64 k = 1; k <= tree.deepest; k++, begin = end) {
        parents.clear();
        for (; end < N && tree.depth[end] == k; end++) {
            int64 parent = h.seen == 2 ? tree.parent[end] : 0;
            if (parents.empty() || parents.back() != parent) parents.push_back(parent);
        }
        int64 M = parents.size(), rows = B * M;
        int64 tokens = h.seen == 0 ? 0 : (h.seen == 1 ? 1 : k) - first;         // that this head sees itself
        int64 size = trunk ? H : context, inputs = size + tokens * H;
        for (int64 r = worker.begin(rows); r < worker.end(rows); r++) {
            int64 b = r / M, node = parents[r % M];
            float* z = input + r * inputs;
            const float* recent = s.recent_hidden + b * context;
            const float* newest = trunk ? context_x + (b * K + k - 1) * H : recent + context - H;
            memcpy(x + r * H, newest, H * sizeof(float));
            memcpy(z, trunk ? newest : recent, size * sizeof(float));
            if (tokens) embed_scaled(m, e.ids[b * N + node], known + (b * N + node) * H);
            for (int64 t = tokens; t > 0; t--) {                                // from the parent back towards the root
                memcpy(z + size + (t - 1) * H, known + (b * N + node) * H, H * sizeof(float));
                node = tree.parent[node];
            }
        }
        worker.barrier();
        for (int64 j = 0; j < h.layers; j++)
            block(worker, e, h.block[(k - 1) * h.layers + j], x, j ? x : input, j ? H : inputs, rows);
        const Matrix& vocabulary = h.vocabulary[k - 1];
        product(worker, {x, H}, rows, {&vocabulary}, {logits});
        worker.barrier();
        Best best;
        for (int64 r = worker.begin(rows); r < worker.end(rows); r++) {
            int64 b = r / M;
            uint64 key = noise_key(s.seed[b], s.emitted[b] + k - 1);
            int64 wanted = std::min(ranks, h.draft_size);
            best.find(logits + r * vocabulary.width(), h.draft_size, wanted, sampling.temperature, key, h.token_map);
            for (int64 i = 0; i < wanted; i++)
                e.guesses[r * ranks + i] = h.token_map ? h.token_map[best.id[i]] : best.id[i];
        }
        worker.barrier();
        for (int64 b = 0; worker.id == 0 && b < B; b++)
            for (int64 n = begin, m = 0; n < end; n++) {
                if (h.seen == 2 && parents[m] != tree.parent[n]) m++;
                e.ids[b * N + n] = e.guesses[(b * M + m) * ranks + tree.rank[n]];
            }
        worker.barrier();
    }
}

// --------------------------------------------------------------------------------------------------- accept and commit
// The longest path on which every draft is the token sampled at its parent: path and out [B, P], count [B].
static void accept(Engine& e, State& s, const Tree& tree, const Sampling& sampling, int64 row, int64* out,
                   int64* count) {
    int64 P = tree.deepest + 1, N = tree.nodes, node = 0, depth = 0;
    const Matrix& head = e.model.lm_head;
    for (;; depth++) {
        e.path[row * P + depth] = node;
        const float* logits = e.logits + (row * N + node) * head.width();
        int64 token = sample(logits, head.outputs, sampling, noise_key(s.seed[row], s.emitted[row] + depth));
        out[row * P + depth] = token;
        int64 child = node + 1;
        while (child < N && (tree.parent[child] != node || e.ids[row * N + child] != token)) child++;
        if (child == N) break;
        node = child;
    }
    count[row] = depth + 1;
}

// How many of the tokens stay: up to the row's limit and its first end-of-text token.
static int64 truncated(const int64* out, int64 count, int64 remaining, const std::vector<int64>& eos) {
    for (int64 i = 0; i < count; i++)
        if (std::find(eos.begin(), eos.end(), out[i]) != eos.end()) count = i + 1;
    return std::min(count, remaining);
}

// The path's nodes behind the root go to the end of the row's cache; the root is there.
static void keep_path(Engine& e, State& s, int64 layer, int64 row, const int64* path, int64 count) {
    Slots from = nodes_of(e, layer, row), to = cache_of(e, s, layer, row);
    int64 D = e.model.head_dim;
    for (int64 j = 1; j < count; j++)
        for (int64 g = 0; g < e.model.kv_heads; g++) {
            int64 old = Slots::offset(path[j], D), slot = Slots::offset(s.length[row] + j, D);
            for (int64 d = 0; d < D; d++) {
                to.key(g)[slot + d * W] = from.key(g)[old + d * W];
                to.value(g)[slot + d * W] = from.value(g)[old + d * W];
            }
        }
}

// Move on by count[row] tokens; with a count of 0 a row's state stays as it was.
static void commit(Engine& e, State& s, int64 P, const int64* path, int64 T, const float* hidden, int64 row,
                   const int64* out, int64 count, const std::vector<int64>& eos) {
    int64 H = e.model.hidden, R = s.recent;
    float* recent = s.recent_hidden + row * R * H;
    int64 moved = std::min(count, R);
    memmove(recent, recent + moved * H, (R - moved) * H * sizeof(float));
    for (int64 j = 0; j < moved; j++) {
        int64 node = path[row * P + count - moved + j];
        memcpy(recent + (R - moved + j) * H, hidden + (row * T + node) * H, H * sizeof(float));
    }
    s.length[row] += count, s.emitted[row] += count, s.remaining[row] -= count;
    if (count) s.token[row] = out[row * P + count - 1];
    if (std::find(eos.begin(), eos.end(), s.token[row]) != eos.end()) s.remaining[row] = 0;
}

// ---------------------------------------------------------------------------------------------------------- interface
static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

extern "C" {
int64 engine_lanes() { return W; }
int64 engine_screens() {                    // does it pay to read the lm_head in 8 bits first?
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    return 1;
#else
    return 0;
#endif
}
Engine* engine_new(const Model* model) { return new Engine(*model); }
void engine_free(Engine* engine) { delete engine; }
void engine_threads(Engine* engine, int64 threads) { engine->set_threads(threads); }

int64 engine_matrix_bytes(const Matrix* m) { return m->bytes(); }
void engine_pack(Matrix* m, int64 first, int64 rows, const void* source) { pack(*m, first, rows, source); }

// Ask for large pages, before anything is written: the memory is read from end to end at each step.
void engine_large_pages(char* memory, int64 bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t begin = rounded_up((uintptr_t)memory, 4096), end = (uintptr_t)(memory + bytes) / 4096 * 4096;
    if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

void engine_rows(const Matrix* m, int64 n, const int64* ids, float* out) {
    for (int64 i = 0; i < n; i++) unpacked_row(*m, ids[i], out + i * m->inputs);
}

void engine_product(Engine* e, const Matrix* m, int64 rows, const float* x, float* y) {
    e->run([&](Worker& worker) { product(worker, {x, m->inputs}, rows, {m}, {y}); });
}

// A chain of T new tokens for each row (tree null), or a tree, whose root is a chain of one → hidden [B, T, H].
const float* engine_forward(Engine* e, State* s, const Tree* tree, int64 T, const int64* ids, const int64* depth) {
    e->reserve(s->rows, T, tree != nullptr);
    e->run([&](Worker& worker) { forward(worker, *e, *s, tree, ids, depth); });
    return e->hidden;
}

const int64* engine_draft(Engine* e, State* s, const Heads* heads, const Tree* tree, const Sampling* sampling) {
    e->run([&](Worker& worker) { draft(worker, *e, *s, *heads, *tree, *sampling); });
    return e->ids.data();
}

// What another rule accepted: path and out [B, P], hidden [B, T, H], count [B], which is cut where the text ends.
void engine_commit(Engine* e, State* s, int64 P, const int64* path, int64 T, const float* hidden, const int64* out,
                   int64* count, int64 eos_count, const int64* eos_ids) {
    std::vector<int64> eos(eos_ids, eos_ids + eos_count);
    for (int64 row = 0; row < s->rows; row++) {
        count[row] = truncated(out + row * P, count[row], s->remaining[row], eos);
        for (int64 i = 0; i < e->model.layers; i++) keep_path(*e, *s, i, row, path + row * P, count[row]);
        commit(*e, *s, P, path, T, hidden, row, out, count[row], eos);
    }
}

// A whole step: tinymedusa.Decoder.step. out [B, P], count [B]; clock [5]: its begin and the ends of its four stages.
void engine_step(Engine* e, State* s, const Heads* heads, const Tree* tree, const Sampling* sampling, int64 eos_count,
                 const int64* eos_ids, int64* out, int64* count) {
    std::vector<int64> eos(eos_ids, eos_ids + eos_count);
    int64 B = s->rows, N = tree->nodes, P = tree->deepest + 1;
    const Matrix& lm_head = e->model.lm_head;
    e->path.assign(B * P, 0);
    e->run([&](Worker& worker) {
        auto clock = [&](int stage) { if (worker.id == 0) e->clock[stage] = now(); };
        clock(0);
        if (N > 1) draft(worker, *e, *s, *heads, *tree, *sampling);
        else if (worker.id == 0) e->ids.assign(s->token, s->token + B);
        if (worker.id == 0) {
            e->reserve(B, N, N > 1);
            e->logits.fit(B * N * lm_head.width()), e->least.fit(B * N * worker.threads);
        }
        worker.barrier();
        clock(1);
        forward(worker, *e, *s, N > 1 ? tree : nullptr, e->ids.data(), tree->depth);
        logits(worker, *e, B * N, sampling->temperature == 0);
        worker.barrier();
        clock(2);
        for (int64 row = worker.begin(B); row < worker.end(B); row++) {
            accept(*e, *s, *tree, *sampling, row, out, count);
            count[row] = truncated(out + row * P, count[row], s->remaining[row], eos);
        }
        worker.barrier();
        clock(3);
        for (int64 i = worker.begin(B * e->model.layers); i < worker.end(B * e->model.layers); i++) {
            int64 row = i % B;
            keep_path(*e, *s, i / B, row, e->path.data() + row * P, count[row]);
        }
        worker.barrier();
        for (int64 row = worker.begin(B); row < worker.end(B); row++)
            commit(*e, *s, P, e->path.data(), N, e->hidden, row, out, count[row], eos);
        clock(4);
    });
    e->judge(B * N, e->clock[4] - e->clock[0]);
}

const float* engine_logits(const Engine* e) { return e->logits; }
const double* engine_clock(const Engine* e) { return e->clock; }
}
