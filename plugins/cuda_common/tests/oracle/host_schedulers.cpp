// Runs the vendor's schedulers of paged scores on the host: their headers are compiled as they are,
// and what a GPU has is stood in for. Each thread of a block is a thread here, and shuffles meet at
// barriers.
//
// Input, one case a line:   arch next_n num_sms rows length... length_at_launch...
//   with a length for each row and query of the row, first those of the plan.
// Output, one line a case:  "plan" row split ... for num_sms + 1 entries, then for each worker
//   "worker" and its tasks (row, first split, splits), or "endless".

#include <barrier>
#include <cstdint>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define CUTLASS_GLOBAL static
#define CUTLASS_DEVICE
#define __launch_bounds__(...)
#define __shared__
#define DG_STATIC_ASSERT(condition, ...) static_assert(condition, __VA_ARGS__)

struct uint2 { uint32_t x, y; };
struct Dim3 { uint32_t x; };

static thread_local Dim3 threadIdx;
static thread_local Dim3 blockDim;

namespace host {
constexpr uint32_t most_threads = 256;
static uint32_t lanes[most_threads];
static thread_local std::barrier<>* warp;
static thread_local std::barrier<>* block;

// What all lanes of a warp hand in, and one of them is handed back.
static uint32_t exchange(uint32_t value, uint32_t from) {
    lanes[threadIdx.x] = value;
    warp->arrive_and_wait();
    const uint32_t got = lanes[threadIdx.x / 32 * 32 + from];
    warp->arrive_and_wait();
    return got;
}
}  // namespace host

static void cudaGridDependencySynchronize() {}
static void __syncwarp() {}
static void __syncthreads() { host::block->arrive_and_wait(); }
static uint32_t __shfl_sync(uint32_t, uint32_t value, uint32_t from) {
    return host::exchange(value, from);
}
static uint32_t __shfl_up_sync(uint32_t, uint32_t value, uint32_t offset) {
    const uint32_t lane = threadIdx.x % 32;
    return host::exchange(value, lane >= offset ? lane - offset : lane);
}

namespace cutlass {
static uint32_t canonical_warp_idx_sync() { return threadIdx.x / 32; }
}

namespace deep_gemm {
namespace ptx {
static uint32_t get_lane_idx() { return threadIdx.x % 32; }
}
namespace math {
template <typename T> static T ceil_div(T a, T b) { return (a + b - 1) / b; }
static uint32_t warp_inclusive_sum(uint32_t value, uint32_t lane) {
    for (uint32_t offset = 1; offset < 32; offset <<= 1) {
        const uint32_t other = __shfl_up_sync(0xffffffff, value, offset);
        value += lane >= offset ? other : 0;
    }
    return value;
}
}  // namespace math
namespace sched {
alignas(16) uint32_t smem_buffer[4096];
alignas(16) uint32_t smem[4096];
}
}  // namespace deep_gemm

#include <deep_gemm/scheduler/sm90_paged_mqa_logits.cuh>
#include <deep_gemm/scheduler/sm100_paged_mqa_logits.cuh>

using Words = std::vector<uint32_t>;
constexpr uint32_t split = 256, page = 64, heads = 64, chunk = 16;
constexpr int most_tasks = 100000;

template <typename Kernel> static void launch(uint32_t threads, Kernel kernel) {
    std::barrier<> block(threads);
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    for (uint32_t warp = 0; warp < threads / 32; ++warp)
        warps.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::jthread> running;
    for (uint32_t thread = 0; thread < threads; ++thread)
        running.emplace_back([&, thread] {
            threadIdx.x = thread, blockDim.x = threads;
            host::block = &block, host::warp = warps[thread / 32].get();
            kernel();
        });
}

// Lengths behind the last one are read by workers without work: they find a large number here.
static Words spare(Words lens) {
    lens.insert(lens.end(), 8, 1u << 20);
    return lens;
}

template <uint32_t next_n, uint32_t num_sms>
static void sm90(uint32_t rows, const Words& planned, const Words& launched, Words& plan) {
    using namespace deep_gemm::sched;
    constexpr uint32_t atoms = (next_n + 1) / 2;
    const auto lens = spare(planned), now = spare(launched);
    const auto run = [&]<uint32_t aligned>() {
        launch(32, [&] {
            sm90_paged_mqa_logits_metadata<aligned, split, num_sms>(
                rows, next_n, true, lens.data(), nullptr, plan.data());
        });
    };
    rows <= 32 ? run.template operator()<32>() : run.template operator()<64>();
    for (uint32_t entry : plan) std::cout << entry << ' ';
    for (uint32_t sm = 0; sm < num_sms; ++sm) {
        std::ostringstream tasks;
        SM90PagedMQALogitsScheduler<next_n, true, false, page, split / page, atoms> scheduler(
            sm, rows, now.data(), plan.data(), nullptr);
        uint32_t atom, block, blocks;
        int count = 0;
        while (count < most_tasks and scheduler.fetch_next_task(atom, block, blocks)) {
            tasks << atom / atoms << ' ' << block / (split / page) << " 1 ";
            if (++count == 1000 and atom >= rows * atoms) count = most_tasks;
        }
        std::cout << "worker " << (count == most_tasks ? "endless " : tasks.str());
    }
}

template <uint32_t next_n, uint32_t num_sms>
static void sm100(uint32_t rows, const Words& planned, const Words& launched, Words& plan) {
    using namespace deep_gemm::sched;
    constexpr uint32_t block_q = 128 / heads;
    const auto lens = spare(planned), now = spare(launched);
    launch(256, [&] {
        sm100_paged_mqa_logits_metadata<next_n, true, false, block_q, split, num_sms>(
            rows, rows * next_n, lens.data(), nullptr, plan.data());
    });
    for (uint32_t entry : plan) std::cout << entry << ' ';
    const Words table(rows * 4096, 0);
    for (uint32_t sm = 0; sm < num_sms; ++sm) {
        std::ostringstream tasks;
        SM100PagedMQALogitsScheduler<next_n, true, false, heads, split, page, chunk> scheduler(
            sm, now.data(), plan.data(), nullptr, table.data(), 4096, rows * next_n);
        uint32_t q_block, first, splits;
        int count = 0;
        while (count < most_tasks and scheduler.next_q_block(q_block, first, splits)) {
            ++count;
            if (splits > (1u << 24)) count = most_tasks;
            tasks << scheduler.cur_block_table_row << ' ' << first << ' ' << splits << ' ';
        }
        std::cout << "worker " << (count == most_tasks ? "endless " : tasks.str());
    }
}

int main() {
    std::string line;
    while (std::getline(std::cin, line)) {
        std::istringstream in(line);
        uint32_t arch, next_n, num_sms, rows;
        in >> arch >> next_n >> num_sms >> rows;
        Words planned(rows * next_n), launched(rows * next_n), plan((num_sms + 1) * 2);
        for (auto& length : planned) in >> length;
        for (auto& length : launched) in >> length;
        std::cout << "plan ";
        const auto dispatch = [&]<uint32_t n, uint32_t sms>() {
            arch == 90 ? sm90<n, sms>(rows, planned, launched, plan)
                       : sm100<n, sms>(rows, planned, launched, plan);
        };
        const auto of_sms = [&]<uint32_t n>() {
            num_sms == 132 ? dispatch.template operator()<n, 132>()
                           : dispatch.template operator()<n, 5>();
        };
        next_n == 1   ? of_sms.template operator()<1>()
        : next_n == 2 ? of_sms.template operator()<2>()
                      : of_sms.template operator()<3>();
        std::cout << '\n';
    }
}
