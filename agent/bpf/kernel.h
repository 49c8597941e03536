/* The few kernel structures the capture programs look at, relocated against the running kernel (CO-RE).
 *
 * Only names and types of the fields count; offsets come from the kernel's BTF at load. A structure whose name ends in
 * three underscores and a word is the same one as older kernels have it. */
#ifndef REPROTECT_KERNEL_H
#define REPROTECT_KERNEL_H

#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define CORE __attribute__((preserve_access_index))

struct page {
    unsigned long flags;
} CORE;

struct gendisk {
    int major;
    int first_minor;
} CORE;

struct block_device {
    struct gendisk *bd_disk;
} CORE;

struct request_queue {
    struct gendisk *disk; /* 5.16 */
} CORE;

struct bvec_iter {
    __u64 bi_sector;
    unsigned int bi_size;
    unsigned int bi_idx;
    unsigned int bi_bvec_done;
} CORE;

struct bio_vec {
    struct page *bv_page;
    unsigned int bv_len;
    unsigned int bv_offset;
} CORE;

struct bio {
    struct bio *bi_next;
    struct block_device *bi_bdev; /* 5.12 */
    unsigned int bi_opf;
    unsigned char bi_status;
    struct bvec_iter bi_iter;
    void *bi_private;
    struct bio_vec *bi_io_vec;
} CORE;

struct bio___before_5_12 {
    struct gendisk *bi_disk;
} CORE;

struct request {
    struct request_queue *q;
    unsigned int cmd_flags;
    struct bio *bio;
} CORE;

struct request___before_5_16 {
    struct gendisk *rq_disk;
} CORE;

#endif
