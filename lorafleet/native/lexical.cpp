// BM25 of one text in every document of an index: the terms' postings added up, and the best documents.
//
// What numpy does in router_service/routers/lexical.py, in the same order, so that sums have the same bits. There it is
// some forty calls of arrays of a hundred numbers, which cost more than their work.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t PIECE = 4;
constexpr uint16_t SPACE = ' ';

struct Index {
    int64_t documents;
    int64_t pieces;
    const uint64_t* piece;      // [pieces], rising
    const int64_t* piece_row;   // [pieces]
    const int64_t* start;       // [rows]: where a row's postings begin
    const int64_t* having;      // [rows]: how many they are
    const double* most;         // [rows]: what the term adds at most
    const int64_t* document;    // [postings]
    const double* part;         // [postings]
};

struct Sums {
    double most;
    int64_t unknown;  // pieces that no document has
};

// The distinct pieces of words that stand between spaces, rising: four letters of which the inner two are no space.
void pieces_of(const uint16_t* letters, int64_t count, std::vector<uint64_t>& found) {
    found.clear();
    for (int64_t i = 0; i + PIECE <= count; ++i) {
        if (letters[i + 1] == SPACE || letters[i + 2] == SPACE) continue;
        uint64_t piece = 0;
        for (int64_t k = PIECE; k-- > 0;) piece = piece << 16 | letters[i + k];
        found.push_back(piece);
    }
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
}

}  // namespace

// Of `words` (rows) and of the pieces in `letters`; at most `wanted` documents with a score above 0, best first and of
// equal ones the first, into `best` and `score`. How many they are, or -1 where there is no memory.
extern "C" __attribute__((visibility("default"))) int64_t lorafleet_match(
    const Index* index, const uint16_t* letters, int64_t count, const int64_t* words, int64_t word_count,
    int64_t wanted, int64_t* best, double* score, Sums* sums) try {
    thread_local std::vector<uint64_t> pieces;
    thread_local std::vector<double> scores;
    pieces_of(letters, count, pieces);
    scores.assign(static_cast<size_t>(index->documents), 0.0);
    *sums = {0.0, 0};
    const auto add = [&](int64_t row) {
        sums->most += index->most[row];
        const int64_t start = index->start[row], end = start + index->having[row];
        for (int64_t at = start; at < end; ++at) scores[index->document[at]] += index->part[at];
    };
    for (int64_t i = 0; i < word_count; ++i) add(words[i]);
    const uint64_t *from = index->piece, *end = index->piece + index->pieces;
    for (const uint64_t piece : pieces) {
        from = std::lower_bound(from, end, piece);  // both rise
        if (from != end && *from == piece) {
            add(index->piece_row[from - index->piece]);
        } else {
            ++sums->unknown;
        }
    }
    int64_t kept = 0;
    for (int64_t document = 0; document < index->documents; ++document) {
        const double mine = scores[document];
        if (mine <= 0.0 || wanted == 0 || (kept == wanted && mine <= score[kept - 1])) continue;
        int64_t at = kept < wanted ? kept++ : kept - 1;
        for (; at > 0 && score[at - 1] < mine; --at) {
            score[at] = score[at - 1];
            best[at] = best[at - 1];
        }
        score[at] = mine;
        best[at] = document;
    }
    return kept;
} catch (...) {
    return -1;
}
