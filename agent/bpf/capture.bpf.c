/* The capture programs: which blocks of which disk are written, and on wish what.
 *
 * Built twice by build.rs: for typed tracepoints (`tp_btf`, plain loads) and, with RAW_TRACEPOINTS, for kernels without
 * them (every load is a checked read). Invariants: a block is marked at submission and again at completion; the mode word
 * is read once per event; an event that cannot be handled is counted, never ignored.
 * The rest of the agent knows only capture.h. */
#include "kernel.h"
#include "capture.h"

/* A load through a pointer the verifier does not know. */
#define PROBE(place)                                              \
    ({                                                            \
        typeof(place) value_ = 0;                                 \
        bpf_probe_read_kernel(&value_, sizeof(value_), &(place)); \
        value_;                                                   \
    })
#ifdef RAW_TRACEPOINTS
#define GET(place) PROBE(place)
#define TRACEPOINT(name) SEC("raw_tp/" name)
#else
#define GET(place) (place)
#define TRACEPOINT(name) SEC("tp_btf/" name)
#endif

#define REQ_OP_MASK 0xff
#define LONG_WORDS_MAX 1024

char LICENSE[] SEC("license") = "Dual MIT/GPL";

/* Set by the loader before the load, so that what is not wanted or not there is no part of the program. */
const volatile __u8 WITH_LOOP = 1;    /* bpf_loop (5.17) */
const volatile __u8 WITH_DYNPTR = 1;  /* ring records of any length (5.19) */
const volatile __u8 WITH_HOOKS = 0;   /* the test hook */
const volatile __u8 PAGE_SHIFT = 12;
const volatile __u8 FLIGHT_SET_BITS = 13; /* of the number of a set of the table of writes in flight; at least 1 */

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct control);
} control SEC(".maps");

struct bitmap {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
};

/* The dirty map of each disk: bit n of word w stands for block 64 w + n. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
    __uint(max_entries, DISKS_MAX);
    __type(key, __u32);
    __array(values, struct bitmap);
} dirty SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, FLIGHT_SETS_DEFAULT);
    __type(key, __u32);
    __type(value, struct flight_set);
} inflight SEC(".maps");

/* By CPU. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct flights);
} flights SEC(".maps");

/* By CPU * DISKS_MAX + disk. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, DISKS_MAX);
    __type(key, __u32);
    __type(value, struct tally);
} tallies SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, 1 << 26);
} ring SEC(".maps");

/* The address as a number: the verifier follows pointers, and lets no function of its own have one where it takes a number. */
static __always_inline __u64 number_of(void *pointer)
{
    __u64 number = (__u64)pointer;
    asm volatile("%0 = -%0\n%0 = -%0" : "+r"(number));
    return number;
}

static __always_inline __u32 kind_of(__u32 op)
{
    switch (op & REQ_OP_MASK) {
    case 1: return KIND_WRITE;
    case 2: return KIND_FLUSH;
    case 3: return KIND_DISCARD;
    case 5: return KIND_SECURE_ERASE;
    case 9: return KIND_ZEROES;
    case 33: /* a SCSI command, before 5.18 */
    case 35: return KIND_PASSTHROUGH;
    }
    /* Operations with an odd number write; those that are none of the above have no range we know. */
    return (op & 1) ? KIND_ZONE : KIND_NONE;
}

static __always_inline __u32 device(struct gendisk *disk)
{
    return (__u32)GET(disk->major) << 20 | (__u32)GET(disk->first_minor);
}

static __always_inline struct gendisk *disk_of_bio(struct bio *bio)
{
    if (bpf_core_field_exists(bio->bi_bdev)) {
        struct block_device *part = GET(bio->bi_bdev);
        return GET(part->bd_disk);
    }
    return PROBE(((struct bio___before_5_12 *)bio)->bi_disk);
}

static __always_inline struct gendisk *disk_of_request(struct request *rq)
{
    if (bpf_core_field_exists(rq->q->disk)) {
        struct request_queue *queue = GET(rq->q);
        return GET(queue->disk);
    }
    return PROBE(((struct request___before_5_16 *)rq)->rq_disk);
}

static __always_inline struct control *the_control(void)
{
    __u32 zero = 0;
    return bpf_map_lookup_elem(&control, &zero);
}

/* The place of a disk; below 0 of one that is not followed. A function of its own, so that the verifier walks its loop once. */
__attribute__((noinline)) int followed(__u32 number)
{
    struct control *ctl = the_control();
    if (!ctl)
        return -1;
    __u64 end = ctl->disks_end;
    for (__u32 place = 0; place < DISKS_MAX && place < end; place++)
        if (*(volatile __u64 *)&ctl->disks[place] == number)
            return place;
    return -1;
}

static __always_inline struct flights *my_flights(void)
{
    __u32 cpu = bpf_get_smp_processor_id();
    return bpf_map_lookup_elem(&flights, &cpu);
}

static __always_inline struct tally *my_tally(__u32 slot)
{
    __u32 index = bpf_get_smp_processor_id() * DISKS_MAX + slot;
    return bpf_map_lookup_elem(&tallies, &index);
}

/* Testing first saves most of the locked instructions; the harvest's order makes it safe (see capture's documents). */
static __always_inline void mark_word(void *map, __u32 index, __u64 mask)
{
    __u64 *word = bpf_map_lookup_elem(map, &index);
    if (word && (*(volatile __u64 *)word & mask) != mask)
        __sync_fetch_and_or(word, mask);
}

struct run {
    __u32 slot;
    __u32 first_word;
};

static long mark_whole_word(__u32 index, struct run *run)
{
    void *map = bpf_map_lookup_elem(&dirty, &run->slot);
    if (!map)
        return 1;
    mark_word(map, run->first_word + index, ~0ULL);
    return 0;
}

/* Words between the first and the last of a long run. A function of its own, so that the verifier walks its loop once and
 * not at every call. */
__attribute__((noinline)) int mark_words(__u32 slot, __u32 first_word, __u32 count)
{
    if (WITH_LOOP) {
        struct run run = {.slot = slot, .first_word = first_word};
        bpf_loop(count, mark_whole_word, &run, 0);
        return 0;
    }
    void *map = bpf_map_lookup_elem(&dirty, &slot);
    if (!map)
        return 0;
    /* At most 256 MiB without bpf_loop; what is longer is told by the return value. */
    for (__u32 index = 0; index < LONG_WORDS_MAX; index++) {
        if (index >= count)
            return 0;
        mark_word(map, first_word + index, ~0ULL);
    }
    return count > LONG_WORDS_MAX;
}

/* Marks every block that [sector, sector + bytes) touches. */
static __always_inline void mark(__u32 slot, __u64 sector, __u32 bytes)
{
    void *map = bpf_map_lookup_elem(&dirty, &slot);
    if (!map || !bytes)
        return;
    __u64 first = sector >> BLOCK_SECTORS_SHIFT;
    __u64 last = (sector + (bytes >> 9) - 1) >> BLOCK_SECTORS_SHIFT;
    __u32 first_word = first >> 6, last_word = last >> 6;
    __u64 head = ~0ULL << (first & 63), tail = ~0ULL >> (63 - (last & 63));
    if (first_word == last_word) {
        mark_word(map, first_word, head & tail);
        return;
    }
    mark_word(map, first_word, head);
    mark_word(map, last_word, tail);
    if (last_word - first_word > 1 && mark_words(slot, first_word + 1, last_word - first_word - 1)) {
        /* Longer than the loop: the oracle's reader is told by the counter of operations without a range. */
        struct tally *tally = my_tally(slot & (DISKS_MAX - 1));
        if (tally)
            tally->queued[KIND_ZONE]++;
    }
}

/* The test hook: whether this event is to be lost. */
static __always_inline int is_lost(struct control *ctl, __u32 kind, __u32 where, __u64 bio)
{
    if (!WITH_HOOKS || !bio)
        return 0;
    if (where == 2 && ctl->skip_bio == bio) {
        ctl->skip_bio = 0;
        __sync_fetch_and_add(&ctl->skipped, 1);
        return 1;
    }
    if (!ctl->skip_countdown || ctl->skip_kind != kind || !(ctl->skip_where & where))
        return 0;
    if (ctl->skip_where == 3 && where == 2)
        return 0;
    if (--ctl->skip_countdown)
        return 0;
    if (ctl->skip_where == 3)
        ctl->skip_bio = bio;
    __sync_fetch_and_add(&ctl->skipped, 1);
    return 1;
}

#include "data.bpf.h"

#include "flights.bpf.h"

/* An address that comes again was never seen completing: both ranges are marked, the old generation is credited. */
static __always_inline void replace_stale(struct control *ctl, struct flights *mine, struct flight *old)
{
    __u32 remaining = old->remaining >> 9, slot = old->slot & (DISKS_MAX - 1);
    mark(slot, old->sector, old->bytes);
    struct tally *theirs = my_tally(slot);
    if (old->generation >= *(volatile __u64 *)&ctl->reaped_below) {
        mine->credited[old->generation & (GENERATION_SLOTS - 1)]++;
        if (theirs) {
            theirs->stale++;
            theirs->stale_sectors[old->kind == KIND_DISCARD] += remaining;
            if (old->generation < *(volatile __u64 *)&ctl->doubt_below)
                theirs->old_stale_sectors[old->kind == KIND_DISCARD] += remaining;
        }
    }
}

static __always_inline void fly(struct control *ctl, struct tally *tally, __u64 bio, struct flight *flight)
{
    struct flights *mine = my_flights();
    if (!mine)
        return;
    __u64 key = key_of(bio, flight->generation);
    int claimed = claim_flight(bio, key | FLIGHT_BUSY);
    struct flight_set *set = set_at(claimed & ~CLAIMED_STALE);
    if (claimed < 0 || !set) {
        tally->full++;
        return;
    }
    __u32 way = claimed & (FLIGHT_WAYS - 1);
    if (claimed & CLAIMED_STALE)
        replace_stale(ctl, mine, &set->flights[way]);
    set->flights[way] = *flight;
    /* An exchange, because a plain store may be seen before what it says is there. */
    __sync_lock_test_and_set(&set->keys[way], key);
    mine->submitted[flight->generation & (GENERATION_SLOTS - 1)]++;
}

TRACEPOINT("block_bio_queue")
int on_queue(__u64 *ctx)
{
    struct bio *bio = (struct bio *)ctx[0];
    __u32 op = GET(bio->bi_opf), kind = kind_of(op);
    if (kind == KIND_NONE)
        return 0;
    int place = followed(device(disk_of_bio(bio)));
    struct control *ctl = the_control();
    if (place < 0 || !ctl)
        return 0;
    __u64 word = *(volatile __u64 *)&ctl->mode_word;
    if ((word & 0xff) == MODE_OFF || is_lost(ctl, kind, 1, (__u64)bio))
        return 0;
    __u32 slot = place & (DISKS_MAX - 1);
    struct tally *tally = my_tally(slot);
    if (!tally)
        return 0;
    struct flight flight = {
        .sector = GET(bio->bi_iter.bi_sector),
        .generation = word >> 8,
        .bytes = GET(bio->bi_iter.bi_size),
        .slot = slot,
        .kind = kind,
    };
    flight.remaining = flight.bytes;
    if (!flight.bytes) {
        /* A flush, or a zone operation. Nothing is written by a flush. */
        tally->queued[kind == KIND_WRITE ? KIND_FLUSH : kind & 7]++;
        return 0;
    }
    tally->queued[kind & 7]++;
    fly(ctl, tally, number_of(bio), &flight);
    mark(slot, flight.sector, flight.bytes);
    if ((word & 0xff) == MODE_DATA)
        record(ctl, tally, bio, &flight, word, 0);
    return 0;
}

struct walk {
    __u64 bio;
    __u32 left;
    __u32 slot;
    __u32 kind;
    __u32 failed;
};

/* A piece that was split off knows its parent by bi_private; so do pieces of pieces. */
static __always_inline int place_of(__u64 bio, __u64 private)
{
    int place = find_flight(bio);
    if (place >= 0 || !private)
        return place;
    place = find_flight(private);
    if (place >= 0)
        return place;
    __u64 grandparent = (__u64)PROBE(((struct bio *)private)->bi_private);
    return grandparent ? find_flight(grandparent) : -1;
}

/* `bytes` of a bio that began at `sector` are done. */
static __always_inline void bio_done(struct walk *walk, __u64 bio, __u64 private, __u64 sector, __u32 bytes)
{
    struct control *ctl = the_control();
    struct flights *mine = my_flights();
    struct tally *tally = my_tally(walk->slot & (DISKS_MAX - 1));
    if (!ctl || !mine || !tally)
        return;
    mark(walk->slot, sector, bytes);
    int place = place_of(bio, private);
    struct flight_set *set = set_at(place);
    tally->done_bios++;
    if (place < 0 || !set) {
        tally->orphans++;
        return;
    }
    __u64 *key = &set->keys[place & (FLIGHT_WAYS - 1)], held = *(volatile __u64 *)key;
    struct flight *flight = &set->flights[place & (FLIGHT_WAYS - 1)];
    if (flight->slot != walk->slot) {
        tally->orphans++;
        return;
    }
    __u64 generation = flight->generation;
    if (generation < *(volatile __u64 *)&ctl->reaped_below) {
        tally->late++;
        leave_flight(key, held);
        return;
    }
    if (walk->failed) {
        tally->failed++;
        mark(flight->slot, flight->sector, flight->bytes);
    }
    /* Most bios are done in one piece; of one that is done in several, no piece is all that is left but the last. */
    __u32 before = *(volatile __u32 *)&flight->remaining;
    if (before != bytes)
        before = __sync_fetch_and_sub(&flight->remaining, bytes);
    if (before > bytes)
        return;
    if (before < bytes)
        tally->orphans++; /* more was completed than submitted: one of the two was something else */
    if (leave_flight(key, held)) /* or the agent took it away and counted it */
        mine->done[generation & (GENERATION_SLOTS - 1)]++;
}

/* The same as a function of its own, for the loop over further bios: its arguments are numbers, so that the verifier looks at
 * it once. */
__attribute__((noinline)) int further_bio_done(__u64 bio, __u64 private, __u64 sector, __u32 bytes, __u64 place)
{
    struct walk walk = {.slot = place & (DISKS_MAX - 1), .failed = place >> 32};
    bio_done(&walk, bio, private, sector, bytes);
    return 0;
}

static long next_bio(__u32 index, struct walk *walk)
{
    struct bio *bio = (struct bio *)walk->bio;
    if (!bio || !walk->left)
        return 1;
    __u64 sector = PROBE(bio->bi_iter.bi_sector);
    __u32 size = PROBE(bio->bi_iter.bi_size);
    __u32 bytes = size < walk->left ? size : walk->left;
    __u64 private = (__u64)PROBE(bio->bi_private);
    walk->bio = (__u64)PROBE(bio->bi_next);
    walk->left -= bytes;
    if (bytes)
        further_bio_done((__u64)bio, private, sector, bytes, walk->slot | (__u64)walk->failed << 32);
    return 0;
}

TRACEPOINT("block_rq_complete")
int on_request(__u64 *ctx)
{
    struct request *rq = (struct request *)ctx[0];
    __u32 kind = kind_of(GET(rq->cmd_flags));
    if (kind == KIND_NONE)
        return 0;
    struct gendisk *disk = disk_of_request(rq);
    if (!disk)
        return 0;
    int place = followed(device(disk));
    struct control *ctl = the_control();
    if (place < 0 || !ctl || (*(volatile __u64 *)&ctl->mode_word & 0xff) == MODE_OFF)
        return 0;
    struct bio *bio = GET(rq->bio);
    if (is_lost(ctl, kind, 2, (__u64)bio))
        return 0;
    struct walk walk = {.slot = place & (DISKS_MAX - 1), .kind = kind};
    struct tally *tally = my_tally(walk.slot);
    if (!tally)
        return 0;
    walk.failed = (__u32)ctx[1] != 0;
    walk.left = ctx[2];
    __u32 total = walk.left;
    if (kind == KIND_PASSTHROUGH || kind == KIND_FLUSH || !walk.left) {
        /* Nothing, or nothing that we know: a flush, the end of one with data, a command of the driver. */
        tally->done[kind == KIND_WRITE ? KIND_FLUSH : kind & 7]++;
        return 0;
    }
    tally->done[kind & 7]++;
    tally->done_sectors[kind & 7] += walk.left >> 9;
    if (!bio)
        return 0;
    /* Most requests have one bio, which needs no checked reads. */
    __u32 size = GET(bio->bi_iter.bi_size);
    __u32 bytes = size < walk.left ? size : walk.left;
    __u64 private = number_of(GET(bio->bi_private)), sector = GET(bio->bi_iter.bi_sector);
    walk.left -= bytes;
    /* A number, not a pointer that the verifier follows. */
    if (walk.left)
        walk.bio = (__u64)PROBE(bio->bi_next);
    if (bytes)
        bio_done(&walk, number_of(bio), private, sector, bytes);
    if (walk.left && walk.bio) {
        if (WITH_LOOP)
            bpf_loop(1 << 16, next_bio, &walk, 0);
        else
            for (__u32 index = 0; index < 64; index++)
                if (next_bio(index, &walk))
                    break;
        /* More bios than could be walked: the rest is marked, and its entries will be found left over. */
        if (walk.left && walk.bio) {
            mark(walk.slot, sector + ((total - walk.left) >> 9), walk.left);
            tally->orphans++;
        }
    }
    return 0;
}

/* Fires for devices that take bios without requests, and elsewhere for what never became a request: refused or failed
 * early. */
TRACEPOINT("block_bio_complete")
int on_bio(__u64 *ctx)
{
    struct bio *bio = (struct bio *)ctx[1];
    if (kind_of(GET(bio->bi_opf)) == KIND_NONE)
        return 0;
    __u32 failed = GET(bio->bi_status), part = 0;
    __u64 whose = number_of(bio);
    int place = find_flight(whose);
    if (place < 0 && failed) {
        /* A piece that was split off failed before it became a request: its parent is short of that much. */
        whose = number_of(GET(bio->bi_private));
        place = find_flight(whose);
        part = GET(bio->bi_iter.bi_size);
    }
    struct control *ctl = the_control();
    struct flights *mine = my_flights();
    struct flight_set *set = set_at(place);
    if (place < 0 || !set || !ctl || !mine)
        return 0;
    __u64 *key = &set->keys[place & (FLIGHT_WAYS - 1)], held = *(volatile __u64 *)key;
    struct flight *flight = &set->flights[place & (FLIGHT_WAYS - 1)];
    __u32 slot = flight->slot & (DISKS_MAX - 1), kind = flight->kind & 7;
    struct tally *tally = my_tally(slot);
    if (!tally || is_lost(ctl, kind, 2, whose))
        return 0;
    mark(slot, flight->sector, flight->bytes);
    if (failed)
        tally->ended_failed++;
    if (flight->generation < *(volatile __u64 *)&ctl->reaped_below) {
        tally->ended_late++;
        leave_flight(key, held);
        return 0;
    }
    if (part && __sync_fetch_and_sub(&flight->remaining, part) > part)
        return 0;
    __u64 generation = flight->generation, bytes = flight->bytes;
    tally->ended[kind]++;
    tally->ended_sectors[kind] += bytes >> 9;
    if (leave_flight(key, held))
        mine->ended[generation & (GENERATION_SLOTS - 1)]++;
    return 0;
}

/* The self-test: a read of the agent's own, whose buffer holds a known pattern before the device fills it, is recorded as
 * if it were a write. Attached only for the test; nothing is written to any disk. */
TRACEPOINT("block_bio_queue")
int on_probe(__u64 *ctx)
{
    struct bio *bio = (struct bio *)ctx[0];
    struct control *ctl = the_control();
    if (!ctl || (GET(bio->bi_opf) & REQ_OP_MASK) != 0 || bpf_get_current_pid_tgid() >> 32 != ctl->probe_tgid)
        return 0;
    int place = followed(device(disk_of_bio(bio)));
    if (place < 0)
        return 0;
    struct tally *tally = my_tally(place & (DISKS_MAX - 1));
    struct bio_vec *vec = GET(bio->bi_io_vec);
    if (!tally)
        return 0;
    struct flight flight = {
        .sector = GET(bio->bi_iter.bi_sector),
        .bytes = GET(bio->bi_iter.bi_size),
        .slot = place & (DISKS_MAX - 1),
        .kind = KIND_NONE,
    };
    ctl->probe_page = (__u64)PROBE(vec->bv_page);
    ctl->probe_task = bpf_get_current_task();
    ctl->probe_page_bytes = bpf_core_type_size(struct page);
    record(ctl, tally, bio, &flight, ctl->mode_word, RECORD_PROBE);
    return 0;
}
