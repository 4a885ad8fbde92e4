// Is the tree's text plain decoding's, bit for bit? fast/native.cpp on small random models, without Python: for
// sanitizers, other instruction sets and emulators. native_check.sh builds and runs it for all of them.
//
//     native_check [cases]    a line for each, with the share of a tree's levels whose drafts were accepted; status 1
//                             after a failure
//
// Some rows are decoded by a tree, then each plainly: alone, by one thread, its prompt read token by token, its cache
// clean. Equal must be the tokens, the logits of all accepted nodes and, at the end, the hidden states for the heads.
// Greedy trees mostly find their tokens by a screen, which leaves most logits inexact: there the largest must be equal.
#include "../fast/native.cpp"
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>

typedef std::vector<int64> Ids;

struct Random {                             // the same numbers everywhere
    uint64 state;
    int64 below(int64 n) { return (int64)(mix64(state += GOLDEN) >> 33) % n; }
    template <class T> T one_of(std::initializer_list<T> some) { return some.begin()[below(some.size())]; }
    float number() { return (float)(below(255) - 127) / 128; }      // exact in every kind but INT8
};

// ------------------------------------------------------------------------------------------------------------- models
struct Shape { const char* name; int64 hidden, heads, kv_heads, head_dim, inner, layers, vocabulary; bool bias; };
const Shape SHAPES[] = {
    {"GQA, head_dim 10", 60, 6, 2, 10, 131, 2, 97, false}, {"MQA, biases", 67, 4, 1, 16, 96, 2, 131, true},
    {"head_dim 64", 128, 2, 2, 64, 531, 1, 96, false},     {"MHA, head_dim 2", 33, 3, 3, 2, 40, 3, 90, true},
    {"hidden 521", 521, 4, 2, 18, 66, 1, 101, false}};
const char *const KINDS[] = {"float32", "bfloat16", "float16", "int8"}, *const SEEN[] = {"medusa", "root", "hydra"};

struct Net {                                // a model and its heads
    Random& random;
    const Shape& shape;
    int64 kind;
    bool tied;                              // lm_head's rows are the embeddings: tokens repeat, else i + 7 follows i
    std::deque<std::vector<char>> memory;   // all pieces of their exact size, for AddressSanitizer
    std::vector<Layer> layer;
    std::vector<Block> block;
    std::vector<Matrix> vocabulary;
    float* embedding;
    Model model{};
    Heads heads{};

    template <class T> T* piece(int64 n) { return (T*)memory.emplace_back(n * sizeof(T)).data(); }
    float* numbers(int64 n, float scale, float center = 0) {        // a power of 2 and a whole number: no rounding
        float* x = piece<float>(n);
        for (int64 i = 0; i < n; i++) x[i] = center + random.number() * scale;
        return x;
    }
    static float scale(int64 inputs) { return std::exp2(std::floor(std::log2(3.0 / inputs) / 2)); } // sums of about 1
    const void* stored(const float* x, int64 n) {           // as engine_pack wants them
        if (kind == FLOAT32 || kind == INT8) return x;
        uint16_t* to = piece<uint16_t>(n);
        for (int64 i = 0; i < n; i++) {
            uint32_t bits = load<uint32_t>(x + i), half = ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 0x3ff);
            to[i] = kind == BFLOAT16 ? bits >> 16 : x[i] == 0 ? 0 : half | (bits >> 16 & 0x8000);
        }
        return to;
    }
    Matrix packed(int64 outputs, int64 inputs, const float* weights, const float* bias) {
        Matrix m{kind, outputs, inputs, random.below(2), nullptr, kind == INT8 ? piece<float>(outputs) : nullptr, bias};
        m.data = piece<char>(engine_matrix_bytes(&m));
        memset(m.data, 255, engine_matrix_bytes(&m));       // NaN where nothing is packed
        engine_pack(&m, 0, outputs, stored(weights, outputs * inputs));
        return m;
    }
    Matrix matrix(int64 outputs, int64 inputs, bool bias = false) {
        const float* weights = numbers(outputs * inputs, scale(inputs));
        return packed(outputs, inputs, weights, bias ? numbers(outputs, 0.125f) : nullptr);
    }
    Matrix likes(int64 places, const Ids& ids) {            // guesses what comes so many places after a token
        int64 H = shape.hidden, V = shape.vocabulary, n = ids.size();
        float *weights = piece<float>(n * H), part = tied ? 0.5f : scale(H);
        for (int64 i = 0; i < n * H; i++) {
            int64 before = tied ? ids[i / H] : (ids[i / H] + (V - 7) * places) % V;
            weights[i] = embedding[before * H + i % H] * part;
        }
        return packed(n, H, weights, nullptr);
    }
    void screen() {                         // the lm_head in 8 bits too, as native.py makes it
        const Matrix& head = model.lm_head;
        int64 n = head.outputs, H = head.inputs;
        float *weights = piece<float>(n * H), *rounded = piece<float>(H), *error = piece<float>(head.width());
        for (int64 o = 0; o < n; o++) unpacked_row(head, o, weights + o * H);
        Matrix m{INT8, n, H, random.below(2), nullptr, piece<float>(n), nullptr};
        m.data = piece<char>(engine_matrix_bytes(&m));
        engine_pack(&m, 0, n, weights);
        for (int64 o = 0; o < n; o++, weights += H) {
            double off = 0, all = 0;
            unpacked_row(m, o, rounded);
            for (int64 i = 0; i < H; i++)
                off += std::pow(weights[i] - rounded[i], 2), all += std::pow(weights[i], 2);
            error[o] = 1.001 * (std::sqrt(off) + (std::sqrt(H) / 60000 + (H + 16) * 0x1p-23) * std::sqrt(all)) + 1e-20;
        }
        model.screen = m, model.screen_error = error;
    }
    Block made(int64 outputs, int64 inputs, int64 width) {  // a block of heads, a wide one unless width is 0
        Matrix up = matrix(width ? width : outputs, inputs, true);
        return {up, width ? matrix(outputs, width) : Matrix{}};
    }

    Net(Random& random, const Shape& shape, int64 kind, int64 K, int64 positions)
        : random(random), shape(shape), kind(kind), tied(random.one_of({false, false, true})) {
        int64 H = shape.hidden, D = shape.head_dim, A = shape.heads * D, G = shape.kv_heads * D, V = shape.vocabulary;
        embedding = numbers(V * H, 1);
        for (int64 i = 0; i < shape.layers; i++) {
            Layer& l = layer.emplace_back();
            l.input_norm = numbers(H, 0.25f, 1), l.post_norm = numbers(H, 0.25f, 1);
            l.q = matrix(A, H, shape.bias), l.k = matrix(G, H, shape.bias), l.v = matrix(G, H, shape.bias);
            l.o = matrix(H, A), l.gate = matrix(shape.inner, H), l.up = matrix(shape.inner, H);
            l.down = matrix(H, shape.inner);
        }
        float *cos = piece<float>(positions * D), *sin = piece<float>(positions * D);
        for (int64 i = 0; i < positions * D; i++) {
            double angle = i / D * std::pow(10000.0, -2.0 * (i % (D / 2)) / D);
            cos[i] = std::cos(angle), sin[i] = std::sin(angle) * (i % D < D / 2 ? -1 : 1);
        }
        int64 seen = random.below(3), recent = 1 + random.below(2), layers = 1 + random.below(2);
        int64 trunk = random.one_of({0, 0, 37}), width = random.one_of({0, 45});
        bool map = random.one_of({false, false, true});
        Ids all, drafted;
        for (int64 i = 0; i < V; i++) {
            all.push_back(i);
            if (!map || i % 4) drafted.push_back(i);
        }
        const float* norm = numbers(H, 0.25f, 1);
        model = {H, shape.heads, shape.kv_heads, D, shape.layers, 1e-5, layer.data(), norm, likes(1, all), {}, nullptr,
                 kind == INT8 ? 0 : kind, tied ? nullptr : stored(embedding, V * H), cos, sin};
        heads = {K, layers, recent, seen, trunk, (int64)drafted.size(), {}, nullptr, nullptr, nullptr};
        if (map) heads.token_map = (int64*)memcpy(piece<int64>(V), drafted.data(), drafted.size() * sizeof(int64));
        if (trunk) heads.trunk = made(H * K, H * (recent + (seen > 0)), trunk);
        for (int64 k = 1; k <= K; k++) {
            int64 tokens = seen == 2 ? k : seen, inputs = H * (trunk ? std::max<int64>(tokens, 1) : recent + tokens);
            for (int64 j = 0; j < layers; j++) block.push_back(made(H, j ? H : inputs, width));
            vocabulary.push_back(tied && !map ? model.lm_head : likes(k + 1, drafted));
        }
        heads.block = block.data(), heads.vocabulary = vocabulary.data();
    }
};

struct Growth {                             // a tree: parents never decrease, so nodes are sorted by depth, then parent
    const char* form = "root";
    Ids parent{0}, depth{0}, rank{0};

    void grow(Random& random) {
        form = random.one_of({"chain", "star", "binary", "random"});
        int64 nodes = random.one_of({2, 3, 6, 17, 18, 33, 64});
        for (int64 n = 1; n < nodes; n++) {
            int64 any = std::min(n - 1, parent[n - 1] + random.one_of({0, 0, 1, 2}));
            parent.push_back(*form == 'c' ? n - 1 : *form == 's' ? 0 : *form == 'b' ? (n - 1) / 2 : any);
            depth.push_back(depth[parent[n]] + 1);
            bool sibling = n > 1 && parent[n] == parent[n - 1];
            rank.push_back(sibling ? rank[n - 1] + 1 : *form == 'r' ? random.below(2) : 0);
        }
    }
    Tree tree() const { return {(int64)parent.size(), depth.back(), parent.data(), depth.data(), rank.data()}; }
};

// ----------------------------------------------------------------------------------------------------------- decoding
struct Prompt { Ids ids; int64 wanted, seed; };
struct Text { Ids tokens; std::vector<float> logits, recent; int64 steps; };        // of a row

static std::vector<Text> decode(const Net& net, const std::vector<Prompt>& prompts, const Growth& growth,
                                const Sampling& sampling, const Ids& eos, int64 threads, int64 chunk, float stale) {
    const Model& m = net.model;
    Tree tree = growth.tree();
    int64 B = prompts.size(), H = m.hidden, R = net.heads.recent, P = tree.deepest + 1, longest = 0, step = 0;
    Ids known, length(B), token(B), emitted(B), remaining(B), seed(B), out(B * P), count(B), depth, ids;
    for (int64 b = 0; b < B; b++) {
        known.push_back(prompts[b].ids.size() - 1);         // a prompt's last token is the root of the first tree
        token[b] = prompts[b].ids.back(), remaining[b] = prompts[b].wanted, seed[b] = prompts[b].seed;
        longest = std::max(longest, known[b]);
    }
    int64 blocks = rounded_up(longest + 1 + prompts[0].wanted + tree.nodes, 4 * W) / W;
    int64 row_stride = 2 * m.kv_heads * blocks * m.head_dim * W;
    std::vector<float> cache(m.layers * B * row_stride, stale), recent(B * R * H);
    State s{cache.data(), B * row_stride, row_stride, blocks, B, length.data(), token.data(), recent.data(),
            emitted.data(), remaining.data(), seed.data(), R};
    Engine* e = engine_new(&m);
    engine_threads(e, threads);
    for (int64 begin = 0, T; begin < longest; begin += T) {
        T = std::min(chunk, longest - begin);
        ids.assign(B * T, 0), depth.resize(T);
        for (int64 b = 0; b < B; b++)
            for (int64 t = 0; t < T; t++) ids[b * T + t] = prompts[b].ids[std::min(begin + t, known[b])], depth[t] = t;
        const float* hidden = engine_forward(e, &s, nullptr, T, ids.data(), depth.data());
        for (int64 b = 0; b < B; length[b++] += T)
            for (int64 t = 0; t < T; t++) {
                int64 place = R - known[b] + begin + t;
                if (0 <= place && place < R) std::copy_n(hidden + (b * T + t) * H, H, &recent[(b * R + place) * H]);
            }
    }
    std::copy(known.begin(), known.end(), length.begin());
    std::vector<Text> texts(B);
    while (*std::max_element(remaining.begin(), remaining.end()) > 0) {
        e->alone = step++ % 4 == 3;         // all threads at most steps, however busy the machine is
        engine_step(e, &s, &net.heads, &tree, &sampling, eos.size(), eos.data(), out.data(), count.data());
        for (int64 b = 0; b < B; b++) {
            texts[b].steps += count[b] > 0;
            for (int64 j = 0; j < count[b]; j++) {
                const float* logits = engine_logits(e) + (b * tree.nodes + e->path[b * P + j]) * m.lm_head.width();
                bool screened = m.screen.data && sampling.temperature == 0;
                if (screened) texts[b].logits.push_back(logits[out[b * P + j]]);
                else texts[b].logits.insert(texts[b].logits.end(), logits, logits + m.lm_head.outputs);
                texts[b].tokens.push_back(out[b * P + j]);
            }
        }
    }
    for (int64 b = 0; b < B; b++) texts[b].recent.assign(&recent[b * R * H], &recent[b * R * H] + R * H);
    engine_free(e);
    return texts;
}

// Where a first differs from b in a bit, or isn't finite; -1: nowhere.
static int64 difference(const std::vector<float>& a, const std::vector<float>& b) {
    for (size_t i = 0; i < std::max(a.size(), b.size()); i++)
        if (i >= std::min(a.size(), b.size()) || memcmp(&a[i], &b[i], sizeof(float)) || !std::isfinite(a[i])) return i;
    return -1;
}

// Of the logits that tokens were chosen from, those of the tokens.
static std::vector<float> largest_of_each(const std::vector<float>& logits, const Ids& tokens, int64 vocabulary) {
    std::vector<float> largest;
    for (size_t i = 0; i < tokens.size(); i++) largest.push_back(logits[i * vocabulary + tokens[i]]);
    return largest;
}

int main(int argc, char** argv) {
    const Sampling samplings[] = {{0, 0, 1}, {0.7, 0, 1}, {1, 5, 1}, {0.9, 0, 0.8}, {1.2, 20, 0.9, 0.1}};
    int64 cases = argc > 1 ? atoi(argv[1]) : 80, failed = 0, accepted = 0, possible = 0;
    uint64 greedy = 0, all = 0;             // checksums of tokens
    for (int64 n = 0; n < cases; n++) {
        Random random{mix64(n)};
        const Shape& shape = SHAPES[n % 5];
        int64 kind = n / 5 % 4, threads = 1 + random.below(2), chunk = 2 + random.below(40), good = 0, most = 0;
        Sampling sampling = samplings[random.one_of({0, 0, 0, 1, 2, 3, 4})];
        std::vector<Prompt> prompts(1 + random.below(3));
        for (Prompt& prompt : prompts) {
            for (int64 size = 1 + random.below(70); size; size--) prompt.ids.push_back(random.below(shape.vocabulary));
            prompt.wanted = 40 - 9 * (&prompt - &prompts[0]), prompt.seed = random.below(1000);
        }
        Ids eos = random.below(4) ? Ids{} : Ids{1, 30};         // ends some texts early
        Growth growth;
        growth.grow(random);
        Net net(random, shape, kind, growth.depth.back(), 70 + 40 + growth.depth.back());
        bool screened = kind != INT8 && sampling.temperature == 0 && random.below(4);
        std::vector<Text> plains;
        for (const Prompt& prompt : prompts)
            plains.push_back(decode(net, {prompt}, Growth(), sampling, eos, 1, 1, 0)[0]);
        if (screened) net.screen();
        std::vector<Text> texts = decode(net, prompts, growth, sampling, eos, threads, chunk, 1000);
        std::string problem;
        for (size_t b = 0; b < prompts.size(); b++) {
            Text& plain = plains[b];
            if (screened) plain.logits = largest_of_each(plain.logits, plain.tokens, shape.vocabulary);
            int64 place = difference(plain.logits, texts[b].logits);
            std::string what = plain.tokens == texts[b].tokens ? "" : " other TOKENS";
            int64 of_a_token = screened ? 1 : shape.vocabulary;
            if (place >= 0) what += " other LOGITS from token " + std::to_string(place / of_a_token);
            if (what.empty() && difference(plain.recent, texts[b].recent) >= 0) what = " other HIDDEN states";
            if (!what.empty()) problem += (problem.empty() ? "row " : ", row ") + std::to_string(b) + ":" + what;
            good += texts[b].tokens.size() - texts[b].steps, most += texts[b].steps * growth.depth.back();
            for (int64 id : plain.tokens) {
                all = mix64(all + id + 1);
                if (kind == FLOAT32 && sampling.temperature == 0) greedy = mix64(greedy + id + 1);
            }
        }
        failed += !problem.empty(), accepted += good, possible += most;
        printf("%3d %-16s %-8s %-4s  %-6s%-6s%-4s %-6s %2d nodes  ", (int)n, shape.name, KINDS[kind],
               net.tied ? "tied" : "", SEEN[net.heads.seen], net.heads.trunk_width ? "+trunk" : "",
               net.heads.token_map ? "+map" : "", growth.form, (int)growth.parent.size());
        printf("T %.1f k %-2d p %.1f  %d rows %d threads  %3.0f%% %s\n", sampling.temperature, (int)sampling.top_k,
               sampling.top_p, (int)prompts.size(), (int)threads, 100.0 * good / most,
               problem.empty() ? "OK" : problem.c_str());
        fflush(stdout);
    }
    printf("%d cases of W %d, %d failed, accepted %.1f%%, greedy float32 tokens %08x, all %08x\n", (int)cases, W,
           (int)failed, 100.0 * accepted / possible, (uint32_t)greedy, (uint32_t)all);
    return failed || !accepted;
}
