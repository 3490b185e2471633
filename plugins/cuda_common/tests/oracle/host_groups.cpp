// Runs the vendor's scheduler of grouped products on the host: its header is compiled as it is, and
// what a GPU has is stood in for. It is the one of Hopper, with 4 groups.
//
// Input, one case a line:   kind block_rows num_sms rows number...
//   kind "rows": the group of each row; "ends": the end of each group; "slots": the count of each,
//   where rows are those of one slot.
// Output, one line a case:  for each tile of each multiprocessor its first row of the result, its
//   group, and whether each 64 rows of it are computed, as "row group flag flag", one after another.

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#define CUTLASS_DEVICE
#define CUTLASS_HOST_DEVICE
#define DG_STATIC_ASSERT(condition, ...) static_assert(condition, __VA_ARGS__)
#define DG_TRAP_ONLY_DEVICE_ASSERT(condition)

struct Dim3 { uint32_t x; };
static Dim3 blockIdx;
using std::min;

namespace cute {
using std::max;
using std::numeric_limits;
}

namespace deep_gemm::math {
template <typename T> static T ceil_div(T a, T b) { return (a + b - 1) / b; }
template <typename T> static T align(T a, T b) { return ceil_div(a, b) * b; }
template <typename T> static constexpr T constexpr_ceil_div(T a, T b) { return (a + b - 1) / b; }
}

#include <deep_gemm/scheduler/gemm.cuh>

using namespace deep_gemm;
constexpr uint32_t groups = 4, columns = 128, block_columns = 64, warpgroup = 64;

template <GemmType kind, uint32_t block_rows, uint32_t num_sms>
static void run(uint32_t rows, std::vector<int> numbers) {
    constexpr bool is_masked = kind == GemmType::MGroupedMasked;
    using Groups = sched::Scheduler<kind, block_rows, block_columns, groups, 1, false, num_sms>;
    for (blockIdx.x = 0; blockIdx.x < num_sms; ++blockIdx.x) {
        Groups scheduler(rows, columns, 128, numbers.data());
        uint32_t row_block, column_block;
        while (scheduler.get_next_block(row_block, column_block)) {
            const auto first = scheduler.template get_global_idx<is_masked>(rows, block_rows, row_block);
            const auto of_weight = scheduler.template get_global_idx<true>(
                columns, block_columns, column_block, row_block);
            std::cout << first << ' ' << of_weight / columns;
            for (uint32_t offset = 0; offset < 128; offset += warpgroup) {
                const bool is_there = offset < block_rows and
                    (kind != GemmType::MGroupedContiguous or row_block * block_rows + offset < rows);
                const bool flag = is_there and scheduler.is_computation_valid(row_block, offset);
                std::cout << ' ' << flag;
            }
            std::cout << ' ';
        }
    }
}

int main() {
    std::string line;
    while (std::getline(std::cin, line)) {
        std::istringstream in(line);
        std::string kind;
        uint32_t block_rows, num_sms, rows;
        in >> kind >> block_rows >> num_sms >> rows;
        std::vector<int> numbers(kind == "rows" ? rows : groups);
        for (auto& number : numbers) in >> number;
        numbers.resize(numbers.size() + 256, -1);
        const auto of_kind = [&]<uint32_t block, uint32_t sms>() {
            if (kind == "rows")
                run<GemmType::MGroupedContiguous, block, sms>(rows, numbers);
            else if (kind == "ends")
                run<GemmType::MGroupedContiguousWithPsumLayout, block, sms>(rows, numbers);
            else
                run<GemmType::MGroupedMasked, block, sms>(rows, numbers);
        };
        const auto of_sms = [&]<uint32_t block>() {
            num_sms == 132 ? of_kind.template operator()<block, 132>()
                           : of_kind.template operator()<block, 3>();
        };
        block_rows == 128 ? of_sms.template operator()<128>() : of_sms.template operator()<64>();
        std::cout << '\n';
    }
}
