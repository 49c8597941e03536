/* What the programs and the agent share: maps' values and records of the ring. `layout.rs` states the same in Rust and
 * its test compares sizes and offsets with the ones this file asserts.
 *
 * Units: sectors of 512 bytes, blocks of 4096 bytes. Counters only grow. */
#ifndef REPROTECT_CAPTURE_H
#define REPROTECT_CAPTURE_H

#define DISKS_MAX 64
#define FLIGHT_SETS_DEFAULT 8192
#define FLIGHT_WAYS 8
#define GENERATION_SLOTS 16
#define BLOCK_SECTORS_SHIFT 3

/* Kinds of operations; the index into every table of counters. */
enum kind {
    KIND_WRITE = 0,
    KIND_DISCARD = 1,
    KIND_SECURE_ERASE = 2,
    KIND_ZEROES = 3,
    KIND_FLUSH = 4,       /* without data */
    KIND_PASSTHROUGH = 5, /* a driver's own command that may write: its range is not known */
    KIND_ZONE = 6,        /* zone append, reset and the like: range not known */
    KIND_NONE = 7,        /* reads and what cannot write */
};
#define KINDS 8

/* Mode: the low byte of the mode word; the generation stands above it. */
enum mode {
    MODE_OFF = 0,
    MODE_BITMAP = 1,
    MODE_DATA = 2,
};

/* One for the machine; the agent writes all but `drops`. */
struct control {
    __u64 mode_word;    /* mode | generation << 8, read once per event */
    __u64 reaped_below; /* entries of older generations are given up */
    __u64 drops;        /* records that found no place in the ring */
    __u64 address_base; /* C of: address = page * page size / sizeof(struct page) + C */
    /* The test hook: the n-th event of a kind is treated as if the program had not run. */
    __u64 skip_countdown; /* 0: unarmed */
    __u32 skip_kind;
    __u32 skip_where; /* 1 submission, 2 completion, 3 both of one bio */
    __u64 skip_bio;   /* whose completion is to be skipped */
    __u64 skipped;    /* events skipped */
    /* What the self-test learns. */
    __u64 probe_tgid;
    __u64 probe_page;
    __u64 probe_task;
    __u64 probe_page_bytes; /* sizeof(struct page) */
    __u64 doubt_below; /* entries of older generations that are overwritten are counted apart */
    /* The agent's own: entries given up, by generation, so that their place in the counters can be used again. */
    __u64 written_off[GENERATION_SLOTS];
    /* Bios that stand, or once stood, in the set beside their own; 0: nobody needs to look there. Only grows. */
    __u64 spilled;
    /* Followed disks by place: device number, major << 20 | minor; 0 where there is none, and from `disks_end` on. */
    __u64 disks_end;
    __u64 disks[DISKS_MAX];
};

/* Writes of each generation, one per CPU. Each field has one writing program, so plain additions do. */
struct flights {
    __u64 submitted[GENERATION_SLOTS]; /* on_queue */
    __u64 credited[GENERATION_SLOTS];  /* on_queue: stale entries */
    __u64 done[GENERATION_SLOTS];      /* on_request */
    __u64 ended[GENERATION_SLOTS];     /* on_bio */
};

/* What happened on one disk, one per CPU and disk. */
struct tally {
    /* on_queue */
    __u64 queued[KINDS];
    __u64 stale;            /* an address came again without a completion in between */
    __u64 stale_sectors[2]; /* not seen completing: 0 written, 1 discarded */
    __u64 full;             /* no place in the table of writes in flight */
    __u64 records;
    __u64 record_bytes;
    __u64 unrecorded; /* records that could not be made */
    __u64 unmapped;   /* of these: the data could not be read */
    /* on_request */
    __u64 done[KINDS];
    __u64 done_sectors[KINDS];
    __u64 orphans; /* completions without a submission */
    __u64 late;    /* completions of entries that were given up */
    __u64 failed;  /* bios that completed with an error */
    __u64 done_bios;
    /* on_bio */
    __u64 ended[KINDS];
    __u64 ended_sectors[KINDS];
    __u64 ended_failed;
    __u64 ended_late;
    __u64 old_stale_sectors[2]; /* on_queue: of `stale_sectors`, those of entries older than `doubt_below` */
};

/* A write on its way. */
struct flight {
    __u64 sector;
    __u64 generation;
    __u32 bytes;
    __u32 remaining;
    __u32 slot;
    __u32 kind;
};

/* Writes on their way, by the address of their bios. A key is 0: free; or the address with the low byte of the generation
 * in place of its top byte, which is the same for all of the kernel's memory; or that and FLIGHT_BUSY: being filled.
 * Whoever exchanges a key has the place: programs 0 or a stale key for a busy one, programs and the agent a key for 0.
 * So that a key that is the same later is still the same write, the agent takes away only writes of generations that had
 * ended before it looked. The keys of a set are one line of the processor's memory. */
struct flight_set {
    __u64 keys[FLIGHT_WAYS];
    struct flight flights[FLIGHT_WAYS];
};
#define FLIGHT_BUSY 1ULL
#define FLIGHT_ADDRESS_BITS 56

/* Begins every record of the ring; `data_bytes` bytes of data follow. */
struct record {
    __u64 sector;
    __u64 mode_word;
    __u64 drops; /* of the machine, before this record */
    __u64 unused; /* 0 */
    __u32 bytes;
    __u32 data_bytes;
    __u16 slot;
    __u8 kind;
    __u8 flags;
    __u32 reserved;
};
#define RECORD_BYTES 48
#define RECORD_FUA 1
#define RECORD_PROBE 2

_Static_assert(sizeof(struct control) == 760, "control");
_Static_assert(sizeof(struct flights) == 512, "flights");
_Static_assert(sizeof(struct tally) == 448, "tally");
_Static_assert(sizeof(struct flight) == 32, "flight");
_Static_assert(sizeof(struct flight_set) == 320, "flight_set");
_Static_assert(sizeof(struct record) == RECORD_BYTES, "record");

#endif
