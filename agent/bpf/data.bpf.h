/* Copying written data into the ring. Part of capture.bpf.c.
 *
 * Invariants: a record holds a whole bio, or as much of it as one may hold and others hold the rest; what does not exist is
 * counted, and its blocks were marked before. A bio that does not get all its records counts as dropped; its pieces are
 * then newer than the disk at that place for a moment, as any write in flight is. No record wakes the reader: it looks by
 * itself every few milliseconds. */

#define SMALL_BYTES 4096
#ifndef barrier_var
#define barrier_var(var) asm volatile("" : "+r"(var))
#endif

struct small_record {
    struct record head;
    __u8 data[SMALL_BYTES];
};

static __always_inline void lose(struct control *ctl, struct tally *tally, __u8 flags)
{
    if (flags & RECORD_PROBE)
        return;
    __sync_fetch_and_add(&ctl->drops, 1);
    tally->unrecorded++;
}

/* Memory below a page is mapped linearly: the address of a page is a linear function of where its description stands. */
static __always_inline __u64 address_of(struct control *ctl, __u64 page)
{
    return page * ((1ULL << PAGE_SHIFT) / bpf_core_type_size(struct page)) + ctl->address_base;
}

/* A piece of a bio's memory. */
struct vec {
    __u64 page;
    __u32 length;
    __u32 offset;
};

/* In one go where the kernel's own structure is laid out like ours, as it has been in every kernel so far. */
static __always_inline struct vec read_vec(struct bio_vec *from)
{
    struct vec vec = {0};
    if (bpf_core_type_size(struct bio_vec) == sizeof(vec) && bpf_core_field_offset(from->bv_page) == 0 &&
        bpf_core_field_offset(from->bv_len) == 8 && bpf_core_field_offset(from->bv_offset) == 12) {
        bpf_probe_read_kernel(&vec, sizeof(vec), from);
        return vec;
    }
    vec.page = (__u64)PROBE(from->bv_page);
    vec.length = PROBE(from->bv_len);
    vec.offset = PROBE(from->bv_offset);
    return vec;
}

static __always_inline void fill_head(struct record *head, struct control *ctl, struct flight *flight, __u64 word,
                                      __u8 flags)
{
    head->sector = flight->sector;
    head->mode_word = word;
    head->drops = *(volatile __u64 *)&ctl->drops;
    head->unused = 0;
    head->bytes = flight->bytes;
    head->data_bytes = 0;
    head->slot = flight->slot;
    head->kind = flight->kind;
    head->flags = flags;
    head->reserved = 0;
}

/* Copies `bytes` from `from` into the record. The slices of a dynptr have constant length, so the end of a record that is
 * no multiple of a slice is filled by smaller ones. */
#define SLICE_LARGE 4096
#define SLICE_SMALL 512
/* Bytes behind the data, so that the last slice always fits. */
#define SLACK SLICE_SMALL
/* Bytes of a bio that one record holds at most, and how many records a bio may have; what is longer is lost to the ring, not
 * to the map. */
#define LARGE_BYTES_MAX (4 << 20)
#define LARGE_RECORDS_MAX 8

/* Where copying stands; one per CPU, because the verifier follows a map's value no further than it must. */
struct copying {
    __u64 vec;   /* the bio_vec in hand */
    __u32 done;  /* of its bytes */
    __u32 at;    /* in the record */
    __u32 left;  /* of the bio */
    __u32 room;  /* length of the record */
    __u64 from;  /* address of the vec's data */
    __u32 length; /* of the vec */
    __u32 failed;
    __u32 busy;   /* a write that came in the midst of this one must not have it */
    __u32 rest;   /* of the bio, behind the record in hand */
    __u32 base;   /* of the record in hand in the bio */
    struct flight flight;
    __u64 word;
    __u64 flags;
};

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct copying);
} copying SEC(".maps");

static __always_inline void take_vec(struct control *ctl, struct copying *copy)
{
    struct vec vec = read_vec((struct bio_vec *)copy->vec);
    copy->from = address_of(ctl, vec.page) + vec.offset;
    copy->length = vec.length;
}

/* How much the next slice takes. */
static __always_inline __u32 next_piece(struct copying *copy, __u32 most)
{
    __u32 piece = copy->length - copy->done;
    if (piece > copy->left)
        piece = copy->left;
    return piece > most ? most : piece;
}

static __always_inline void advance(struct control *ctl, struct copying *copy, __u32 piece)
{
    copy->at += piece;
    copy->left -= piece;
    copy->done += piece;
    if (copy->done >= copy->length && copy->left) {
        copy->vec += bpf_core_type_size(struct bio_vec);
        copy->done = 0;
        take_vec(ctl, copy);
    }
}

/* One slice; 0 while there is more. */
static __always_inline int copy_slice(struct control *ctl, struct copying *copy, struct bpf_dynptr *out)
{
    void *slice;
    __u32 piece;
    if (!copy->left)
        return 1;
    if (copy->at + SLICE_LARGE <= copy->room) {
        slice = bpf_dynptr_data(out, RECORD_BYTES + copy->at, SLICE_LARGE);
        piece = next_piece(copy, SLICE_LARGE);
        barrier_var(piece);
        if (!slice || piece > SLICE_LARGE || bpf_probe_read_kernel(slice, piece, (void *)(copy->from + copy->done)))
            goto failed;
    } else {
        slice = bpf_dynptr_data(out, RECORD_BYTES + copy->at, SLICE_SMALL);
        piece = next_piece(copy, SLICE_SMALL);
        barrier_var(piece);
        if (!slice || piece > SLICE_SMALL || bpf_probe_read_kernel(slice, piece, (void *)(copy->from + copy->done)))
            goto failed;
    }
    if (!piece)
        goto failed;
    advance(ctl, copy, piece);
    return 0;
failed:
    copy->failed = 1;
    return 1;
}

/* One iteration of the copy; the record is the caller's. */
static long next_slice(__u32 index, struct bpf_dynptr *out)
{
    __u32 zero = 0;
    struct control *ctl = the_control();
    struct copying *copy = bpf_map_lookup_elem(&copying, &zero);
    if (!ctl || !copy)
        return 1;
    return copy_slice(ctl, copy, out) ? 1 : 0;
}

/* One record, of as much of the bio as it may hold; 0 while there is more. A function of its own, so that the verifier looks
 * at it once. */
__attribute__((noinline)) int copy_large(__u32 index)
{
    __u32 zero = 0;
    struct control *ctl = the_control();
    struct copying *copy = bpf_map_lookup_elem(&copying, &zero);
    struct bpf_dynptr out;
    struct record head;
    if (!ctl || !copy || !copy->rest || index >= LARGE_RECORDS_MAX)
        return 1;
    __u32 bytes = copy->rest > LARGE_BYTES_MAX ? LARGE_BYTES_MAX : copy->rest;
    copy->at = 0;
    copy->left = bytes;
    copy->room = ((bytes + 511) & ~511) + SLACK;
    if (copy->done >= copy->length) {
        copy->vec += bpf_core_type_size(struct bio_vec);
        copy->done = 0;
        take_vec(ctl, copy);
    }
    /* A reservation that failed is to be discarded as well, says the verifier. */
    if (bpf_ringbuf_reserve_dynptr(&ring, RECORD_BYTES + copy->room, 0, &out)) {
        bpf_ringbuf_discard_dynptr(&out, BPF_RB_NO_WAKEUP);
        copy->failed = 1;
        return 1;
    }
    /* More than a slice per 4 KiB: a vec may end anywhere. */
    bpf_loop(1 << 14, next_slice, &out, 0);
    fill_head(&head, ctl, &copy->flight, copy->word, copy->flags);
    head.sector = copy->flight.sector + (copy->base >> 9);
    head.bytes = bytes;
    head.data_bytes = bytes;
    if (copy->failed || copy->left || bpf_dynptr_write(&out, 0, &head, sizeof(head), 0)) {
        bpf_ringbuf_discard_dynptr(&out, BPF_RB_NO_WAKEUP);
        copy->failed = 2;
        return 1;
    }
    bpf_ringbuf_submit_dynptr(&out, BPF_RB_NO_WAKEUP);
    copy->rest -= bytes;
    copy->base += bytes;
    return copy->rest ? 0 : 1;
}

static __always_inline void record_large(struct control *ctl, struct tally *tally, struct copying *copy,
                                         struct flight *flight, __u64 word, __u8 flags)
{
    copy->rest = flight->bytes;
    copy->base = 0;
    if (flight->bytes > (__u32)LARGE_BYTES_MAX * LARGE_RECORDS_MAX) {
        lose(ctl, tally, flags);
        return;
    }
    for (__u32 index = 0; !copy_large(index); index++)
        if (index == LARGE_RECORDS_MAX)
            break;
    if (copy->failed || copy->rest) {
        tally->unmapped += copy->failed == 2 && !(flags & RECORD_PROBE);
        lose(ctl, tally, flags);
        return;
    }
    tally->records++;
    tally->record_bytes += flight->bytes;
}

/* Without records of any length, pieces of 4 KiB follow one another. */

/* One piece; 0 while there is more. A function of its own, so that the verifier looks at it once. */
__attribute__((noinline)) int copy_piece(__u32 index)
{
    __u32 zero = 0;
    struct control *ctl = the_control();
    struct copying *copy = bpf_map_lookup_elem(&copying, &zero);
    if (!ctl || !copy || !copy->left)
        return 1;
    struct small_record *out = bpf_ringbuf_reserve(&ring, sizeof(*out), 0);
    if (!out) {
        copy->failed = 1;
        return 1;
    }
    __u32 piece = next_piece(copy, SMALL_BYTES);
    barrier_var(piece);
    if (piece > SMALL_BYTES || !piece ||
        bpf_probe_read_kernel(out->data, piece, (void *)(copy->from + copy->done))) {
        bpf_ringbuf_discard(out, BPF_RB_NO_WAKEUP);
        copy->failed = 1;
        return 1;
    }
    fill_head(&out->head, ctl, &copy->flight, copy->word, copy->flags);
    out->head.sector = copy->flight.sector + (copy->at >> 9);
    out->head.bytes = piece;
    out->head.data_bytes = piece;
    /* A piece that begins or ends inside a sector cannot be written alone. */
    if ((copy->at | piece) & 511)
        copy->failed = 1;
    bpf_ringbuf_submit(out, BPF_RB_NO_WAKEUP);
    advance(ctl, copy, piece);
    return copy->failed ? 1 : 0;
}

static long next_piece_record(__u32 index, void *unused)
{
    return copy_piece(index) ? 1 : 0;
}

static __always_inline void record_pieces(struct control *ctl, struct tally *tally, struct copying *copy,
                                          struct flight *flight, __u64 word, __u8 flags)
{
    if (WITH_LOOP) {
        bpf_loop(1 << 14, next_piece_record, 0, 0);
    } else {
        for (__u32 index = 0; index < 512; index++)
            if (copy_piece(index))
                break;
    }
    if (copy->failed || copy->left) {
        lose(ctl, tally, flags);
        return;
    }
    tally->records++;
    tally->record_bytes += flight->bytes;
}

static __always_inline void record(struct control *ctl, struct tally *tally, struct bio *bio, struct flight *flight,
                                   __u64 word, __u8 flags)
{
    if (flight->kind != KIND_WRITE && !flags) {
        struct record *head = bpf_ringbuf_reserve(&ring, sizeof(*head), 0);
        if (!head) {
            lose(ctl, tally, flags);
            return;
        }
        fill_head(head, ctl, flight, word, flags);
        bpf_ringbuf_submit(head, BPF_RB_NO_WAKEUP);
        tally->records++;
        return;
    }
    /* A number, not a pointer that the verifier follows: older ones let nobody reckon with those. */
    struct bio_vec *place = PROBE(bio->bi_io_vec);
    __u32 at = GET(bio->bi_iter.bi_idx), done = GET(bio->bi_iter.bi_bvec_done);
    place = (struct bio_vec *)((__u64)place + (__u64)at * bpf_core_type_size(struct bio_vec));
    struct vec vec = read_vec(place);
    if (flight->bytes <= SMALL_BYTES && flight->bytes <= vec.length - done) {
        __u64 from = address_of(ctl, vec.page) + vec.offset + done;
        struct small_record *small = bpf_ringbuf_reserve(&ring, sizeof(*small), 0);
        if (!small) {
            lose(ctl, tally, flags);
            return;
        }
        fill_head(&small->head, ctl, flight, word, flags);
        /* Read again, so that the compiler cannot forget the bound that the verifier wants to see. */
        __u32 bytes = *(volatile __u32 *)&flight->bytes;
        if (bytes > SMALL_BYTES || bpf_probe_read_kernel(small->data, bytes, (void *)from)) {
            bpf_ringbuf_discard(small, BPF_RB_NO_WAKEUP);
            tally->unmapped += !(flags & RECORD_PROBE);
            lose(ctl, tally, flags);
            return;
        }
        small->head.data_bytes = bytes;
        bpf_ringbuf_submit(small, BPF_RB_NO_WAKEUP);
        tally->records++;
        tally->record_bytes += bytes;
        return;
    }
    __u32 zero = 0;
    struct copying *copy = bpf_map_lookup_elem(&copying, &zero);
    if (!copy)
        return;
    if (copy->busy) {
        lose(ctl, tally, flags);
        return;
    }
    *(volatile __u32 *)&copy->busy = 1;
    copy->vec = (__u64)place;
    copy->done = done;
    copy->at = 0;
    copy->left = flight->bytes;
    copy->failed = 0;
    copy->from = address_of(ctl, vec.page) + vec.offset;
    copy->length = vec.length;
    copy->flight = *flight;
    copy->word = word;
    copy->flags = flags;
    if (WITH_DYNPTR)
        record_large(ctl, tally, copy, flight, word, flags);
    else
        record_pieces(ctl, tally, copy, flight, word, flags);
    *(volatile __u32 *)&copy->busy = 0;
}
