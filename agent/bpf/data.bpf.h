/* Copying written data into the ring. Part of capture.bpf.c.
 *
 * Invariants: a record holds a whole bio or does not exist; what does not exist is counted, and its blocks were marked
 * before. No record wakes the reader: it looks by itself every few milliseconds. */

#define SMALL_BYTES 4096
#define REQ_FUA (1 << 17)

struct small_record {
    struct record head;
    __u8 data[SMALL_BYTES];
};

static __always_inline void lose(struct control *ctl, struct tally *tally)
{
    __sync_fetch_and_add(&ctl->drops, 1);
    tally->unrecorded++;
}

/* Memory below a page is mapped linearly: the address of a page is a linear function of where its description stands. */
static __always_inline __u64 address_of(struct control *ctl, __u64 page)
{
    return page * ((1ULL << PAGE_SHIFT) / bpf_core_type_size(struct page)) + ctl->address_base;
}

static __always_inline void fill_head(struct record *head, struct control *ctl, struct flight *flight, __u64 word)
{
    head->sector = flight->sector;
    head->mode_word = word;
    head->drops = *(volatile __u64 *)&ctl->drops;
    head->time_ns = bpf_ktime_get_boot_ns();
    head->bytes = flight->bytes;
    head->data_bytes = 0;
    head->slot = flight->slot;
    head->kind = flight->kind;
    head->flags = 0;
    head->reserved = 0;
}

static __always_inline void record(struct control *ctl, struct tally *tally, struct bio *bio, struct flight *flight,
                                   __u64 word)
{
    if (flight->kind != KIND_WRITE) {
        struct record *head = bpf_ringbuf_reserve(&ring, sizeof(*head), 0);
        if (!head) {
            lose(ctl, tally);
            return;
        }
        fill_head(head, ctl, flight, word);
        bpf_ringbuf_submit(head, BPF_RB_NO_WAKEUP);
        tally->records++;
        return;
    }
    struct bio_vec *vec = GET(bio->bi_io_vec);
    __u32 at = GET(bio->bi_iter.bi_idx), done = GET(bio->bi_iter.bi_bvec_done);
    vec = (struct bio_vec *)((__u64)vec + (__u64)at * bpf_core_type_size(struct bio_vec));
    __u32 length = PROBE(vec->bv_len) - done;
    if (flight->bytes <= SMALL_BYTES && flight->bytes <= length) {
        __u64 from = address_of(ctl, (__u64)PROBE(vec->bv_page)) + PROBE(vec->bv_offset) + done;
        struct small_record *small = bpf_ringbuf_reserve(&ring, sizeof(*small), 0);
        if (!small) {
            lose(ctl, tally);
            return;
        }
        fill_head(&small->head, ctl, flight, word);
        /* Read again, so that the compiler cannot forget the bound that the verifier wants to see. */
        __u32 bytes = *(volatile __u32 *)&flight->bytes;
        if (bytes > SMALL_BYTES || bpf_probe_read_kernel(small->data, bytes, (void *)from)) {
            bpf_ringbuf_discard(small, BPF_RB_NO_WAKEUP);
            tally->unmapped++;
            lose(ctl, tally);
            return;
        }
        small->head.data_bytes = bytes;
        bpf_ringbuf_submit(small, BPF_RB_NO_WAKEUP);
        tally->records++;
        tally->record_bytes += bytes;
        return;
    }
    lose(ctl, tally);
}
