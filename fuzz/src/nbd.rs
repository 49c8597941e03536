//! Entry function for the NBD protocol: everything a client says, in the order in which a server reads it.
//!
//! Invariants checked: what is accepted is written back as it was read; what may be carried out lies inside the export
//! and within the bounds, on every kind of export; replies to it have the lengths they state.

use reprotect_engine::format::nbd::option::{ClientFlags, OptionHeader, OptionRequest};
use reprotect_engine::format::nbd::request::{Allowed, Request, Work};
use reprotect_engine::format::nbd::{OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, reply};

/// Sizes of exports to try requests on: none, small and odd, larger than any request.
const SIZES: [u64; 3] = [0, (1 << 20) + 512, 1 << 40];

/// Flags, then options until an export is chosen, then requests with their payload.
pub fn run(data: &[u8]) {
    let Some((flags, mut rest)) = data.split_first_chunk() else { return };
    let Ok(decoded) = ClientFlags::decode(*flags) else { return };
    assert_eq!(decoded.to_bytes(), *flags);
    while let Some((head, after)) = rest.split_first_chunk() {
        let Ok(header) = OptionHeader::decode(*head) else { return };
        assert_eq!(header.to_bytes(), *head);
        assert!(header.data_bytes <= OPTION_BYTES_MAX);
        let Some((data, after)) = after.split_at_checked(header.data_bytes as usize) else { return };
        rest = after;
        let Ok(option) = OptionRequest::decode(header.option, data) else { continue };
        assert_eq!(option.number(), header.option);
        if !matches!(option, OptionRequest::Other(_)) {
            let written = option.encode();
            assert_eq!(written[..OptionHeader::BYTES], *head);
            assert_eq!(
                &written[OptionHeader::BYTES..],
                data,
                "{option:?} is not written back as it was read"
            );
        }
        if matches!(option, OptionRequest::Go(_) | OptionRequest::ExportName(_)) {
            break;
        }
    }
    while let Some((bytes, after)) = rest.split_first_chunk() {
        let Ok(request) = Request::decode(*bytes) else { return };
        assert_eq!(request.to_bytes(), *bytes);
        check(&request);
        let Some((_, after)) = after.split_at_checked(request.payload_bytes() as usize) else { return };
        rest = after;
    }
}

/// Tries a request on every kind of export.
fn check(request: &Request) {
    for size_bytes in SIZES {
        for kind in 0..8 {
            let [writable, structured, allocation] = [1, 2, 4].map(|bit| kind & bit != 0);
            let allowed = Allowed { size_bytes, writable, structured, allocation };
            match request.check(&allowed) {
                Ok(Work::Read { range, whole }) => {
                    assert!(range.end <= size_bytes && range.len() <= u64::from(PAYLOAD_BYTES_MAX));
                    assert!(structured || !whole);
                    let head = reply::data_head(request.cookie, range, true);
                    assert_eq!(head.len(), reply::DATA_HEAD_BYTES);
                }
                Ok(Work::Write { range, .. }) => {
                    assert!(writable && range.end <= size_bytes);
                    assert_eq!(range.len(), u64::from(request.payload_bytes()));
                    assert!(request.payload_bytes() <= PAYLOAD_BYTES_MAX);
                }
                Ok(Work::Zero { range, .. }) => assert!(writable && range.end <= size_bytes),
                Ok(Work::Status { range, .. }) => {
                    assert!(allocation && !range.is_empty() && range.end <= size_bytes);
                }
                Ok(Work::Flush | Work::Disconnect) => {}
                Err(code) => {
                    assert_eq!(reply::simple(request.cookie, Some(code)).len(), reply::SIMPLE_BYTES);
                }
            }
        }
    }
}
