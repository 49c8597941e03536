/* The table of writes in flight: a set of eight places by the bio's address, and the set beside it when that is full. Part of
 * capture.bpf.c.
 *
 * Invariants: a place belongs to whoever exchanged its key; a bio stands in its own set, or, once `spilled` says that there
 * are such, in the one whose number differs in the lowest bit. A bio's submission, its completions and its next submission
 * follow one another, so that programs meet each other at the same key only as pieces of one bio. Places are numbers (set *
 * FLIGHT_WAYS + way), because functions that the verifier looks at once answer nothing else. */

/* The bit of what claim_flight answers that says the place held an older write of the same address. */
#define CLAIMED_STALE (1 << 30)

static __always_inline __u64 key_of(__u64 bio, __u64 generation)
{
    return bio << (64 - FLIGHT_ADDRESS_BITS) >> (64 - FLIGHT_ADDRESS_BITS) | generation << FLIGHT_ADDRESS_BITS;
}

/* Whether it is a key of that bio, whatever its generation; one that is being filled is nobody's. */
static __always_inline int is_key_of(__u64 key, __u64 bio)
{
    return !((key ^ bio) << (64 - FLIGHT_ADDRESS_BITS));
}

/* Multiplicative: the highest bits of the product depend on all bits of the address. */
static __always_inline __u32 set_of(__u64 bio)
{
    return bio * 0x9e3779b97f4a7c15ULL >> (64 - FLIGHT_SET_BITS);
}

static __always_inline struct flight_set *set_at(int place)
{
    __u32 set = (__u32)place / FLIGHT_WAYS;
    return bpf_map_lookup_elem(&inflight, &set);
}

/* Gives a place back; 0 when it had another owner by then. */
static __always_inline int leave_flight(__u64 *key, __u64 held)
{
    return __sync_val_compare_and_swap(key, held, 0) == held;
}

static __always_inline int find_in(__u32 number, __u64 bio)
{
    struct flight_set *set = bpf_map_lookup_elem(&inflight, &number);
    if (!set)
        return -1;
#pragma unroll
    for (int way = 0; way < FLIGHT_WAYS; way++)
        if (is_key_of(*(volatile __u64 *)&set->keys[way], bio))
            return number * FLIGHT_WAYS + way;
    return -1;
}

/* The place of a bio; below 0 if it has none. */
__attribute__((noinline)) int find_flight(__u64 bio)
{
    struct control *ctl = the_control();
    __u32 number = set_of(bio);
    int place = find_in(number, bio);
    if (place >= 0 || !ctl || !*(volatile __u64 *)&ctl->spilled)
        return place;
    return find_in(number ^ 1, bio);
}

static __always_inline int claim_in(__u32 number, __u64 busy)
{
    struct flight_set *set = bpf_map_lookup_elem(&inflight, &number);
    if (!set)
        return -1;
#pragma unroll
    for (int way = 0; way < FLIGHT_WAYS; way++)
        if (!*(volatile __u64 *)&set->keys[way] && !__sync_val_compare_and_swap(&set->keys[way], 0, busy))
            return number * FLIGHT_WAYS + way;
    return -1;
}

/* A place for a bio, its own where it still has one; below 0 if there is none. Its key is `busy` then. */
__attribute__((noinline)) int claim_flight(__u64 bio, __u64 busy)
{
    struct control *ctl = the_control();
    int place = find_flight(bio);
    struct flight_set *set = set_at(place);
    if (place >= 0 && set) {
        __u64 *key = &set->keys[place & (FLIGHT_WAYS - 1)], held = *(volatile __u64 *)key;
        /* Or the agent took it away just now. */
        if (is_key_of(held, bio) && __sync_val_compare_and_swap(key, held, busy) == held)
            return place | CLAIMED_STALE;
    }
    __u32 number = set_of(bio);
    place = claim_in(number, busy);
    if (place >= 0 || !ctl)
        return place;
    /* Before the key is there, so that whoever looks for it looks there. */
    __sync_fetch_and_add(&ctl->spilled, 1);
    return claim_in(number ^ 1, busy);
}
