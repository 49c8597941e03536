//! Tests of the descriptor parser and writer.

use proptest::prelude::*;

use super::*;

const ESXI: &str = "# Disk DescriptorFile\r\nversion=3\r\nencoding=\"UTF-8\"\r\ncid=1A2b3c4d\r\nparentcid=ffffffff\r\n\
    isNativeSnapshot=\"no\"\r\nCREATETYPE=\"vmfs\"\r\n\r\n# Extent description\r\nRW 41943040 VMFS \"web 1-flat.vmdk\"\r\n\r\n\
    # Change Tracking File\r\nchangeTrackPath=\"web 1-ctk.vmdk\"\r\n\r\n# The Disk Data Base\r\n#DDB\r\n\r\n\
    ddb.adapterType = \"lsilogic\"\r\nddb.vendorThing = \"kept\"\r\n\
    ddb.uuid = \"60 00 C2 9c 8e 3c 4b 1f-aa bb cc dd ee ff 00 11\"\r\n";

fn new(create_type: CreateType, extents: &[Extent]) -> Result<Descriptor, DescriptorError> {
    let (cid, long_content_id) = (0x0123_4567, [7; 16]);
    let uuid = DiskUuid::from_random([0x5a; 16]);
    NewDescriptor {
        create_type,
        extents,
        cid,
        long_content_id,
        uuid,
        adapter: AdapterType::default(),
        hardware_version: 14,
    }
    .build()
}

fn flat(file: &str) -> Extent {
    Extent {
        access: Access::ReadWrite,
        sectors: 4096,
        kind: ExtentKind::Flat,
        file: Some(file.to_owned()),
        offset: 0,
    }
}

#[test]
fn a_descriptor_of_esxi_is_understood_whatever_the_case_of_its_keys() {
    let d = Descriptor::parse(ESXI.as_bytes()).unwrap();
    assert_eq!((d.version(), d.cid(), d.parent_cid()), (3, 0x1a2b_3c4d, CID_NONE));
    assert_eq!(d.create_type(), &CreateType::Vmfs);
    assert_eq!(d.extents().len(), 1);
    assert_eq!(d.extents()[0].file.as_deref(), Some("web 1-flat.vmdk"));
    assert_eq!(d.sectors(), 41_943_040);
    assert_eq!(d.get("DDB.ADAPTERTYPE"), Some("lsilogic"));
    assert_eq!(d.uuid().unwrap().to_string(), "60 00 c2 9c 8e 3c 4b 1f-aa bb cc dd ee ff 00 11");
    assert_eq!(d.text(), ESXI);
}

#[test]
fn a_new_content_identity_changes_eight_characters_and_no_more() {
    let mut d = Descriptor::parse(ESXI.as_bytes()).unwrap();
    d.set_cid(0x0000_00ab);
    assert_eq!(d.text(), ESXI.replace("cid=1A2b3c4d", "cid=000000ab"));
    assert_eq!(Descriptor::parse(d.text().as_bytes()).unwrap(), d);
}

#[test]
fn taking_over_a_tracked_disk_drops_the_line_and_the_version() {
    let mut d = Descriptor::parse(ESXI.as_bytes()).unwrap();
    assert_eq!(d.drop_change_tracking(false).as_deref(), Some("web 1-ctk.vmdk"));
    let expected =
        ESXI.replace("changeTrackPath=\"web 1-ctk.vmdk\"\r\n", "").replace("version=3", "version=1");
    assert_eq!(d.text(), expected);
    assert_eq!(d.drop_change_tracking(false), None);

    let mut d = Descriptor::parse(ESXI.as_bytes()).unwrap();
    assert!(d.drop_change_tracking(true).is_some());
    assert_eq!(d.text().len(), ESXI.len());
    let again = Descriptor::parse(d.text().as_bytes()).unwrap();
    assert_eq!((again.version(), again.get("changeTrackPath")), (1, None));
}

#[test]
fn extent_lines_of_every_type_are_parsed() {
    let text = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"custom\"\n\
        RW 63 FLAT \"a=b.vmdk\" 128\nRDONLY 10 SPARSE \"s.vmdk\"\nNOACCESS 5 ZERO\nRW 7 ZERO\n\
        rw 9 vmfssparse \"d-000001.vmdk\"\nRW 9 SESPARSE \"e.vmdk\"\nRW 9 VMFSRDM \"r.vmdk\"\nRW 9 NEWKIND \"n.vmdk\"\n";
    let d = Descriptor::parse(text.as_bytes()).unwrap();
    let kinds: Vec<_> = d.extents().iter().map(|e| e.kind.clone()).collect();
    assert_eq!(
        kinds,
        [
            ExtentKind::Flat,
            ExtentKind::Sparse,
            ExtentKind::Zero,
            ExtentKind::Zero,
            ExtentKind::VmfsSparse,
            ExtentKind::SeSparse,
            ExtentKind::RawDeviceMap,
            ExtentKind::Other("NEWKIND".into()),
        ]
    );
    assert_eq!((d.extents()[0].offset, d.extents()[0].file.as_deref()), (128, Some("a=b.vmdk")));
    assert_eq!(d.extents()[1].access, Access::ReadOnly);
    assert_eq!(d.create_type(), &CreateType::Other("custom".into()));
}

#[test]
fn bad_lines_are_named_by_number() {
    let with = |line: &str| Descriptor::parse(format!("CID=1\ncreateType=\"vmfs\"\n{line}\n").as_bytes());
    for line in [
        "RW x FLAT \"a\" 0",
        "RW 0 FLAT \"a\" 0",
        "RW 5",
        "RW 5 FLAT \"a",
        "RW 5 FLAT",
        "RW 5 FLAT \"a\" z",
        "RW 18446744073709551615 FLAT \"a\" 1",
    ] {
        assert!(
            matches!(with(line), Err(DescriptorError::Extent { line: 3, .. })),
            "{line}: {:?}",
            with(line)
        );
    }
    assert!(matches!(with("version=x"), Err(DescriptorError::Value { line: 3, key: "version", .. })));
    assert_eq!(Descriptor::parse(b"CID=1\n"), Err(DescriptorError::Missing { key: "createType" }));
    assert_eq!(Descriptor::parse(b"createType=vmfs\n"), Err(DescriptorError::Missing { key: "CID" }));
    assert_eq!(Descriptor::parse(b"ab\xff"), Err(DescriptorError::NotText { at: 2 }));
    let long = vec![b'x'; DESCRIPTOR_BYTES_MAX + 1];
    assert!(matches!(Descriptor::parse(&long), Err(DescriptorError::TooLong { .. })));
}

#[test]
fn new_descriptors_carry_identity_geometry_and_extents() {
    let d = new(CreateType::MonolithicFlat, &[flat("x-flat.vmdk")]).unwrap();
    assert_eq!(d.extents(), [flat("x-flat.vmdk")]);
    assert_eq!(d.get("ddb.longContentID"), Some("07070707070707070707070701234567"));
    assert_eq!(d.get("ddb.geometry.heads"), Some("64"));
    assert_eq!(d.uuid(), Some(DiskUuid::from_random([0x5a; 16])));
    assert!(d.uuid().unwrap().to_string().starts_with("60 00 c2 9a"));
    assert_eq!(d.get("ddb.thinProvisioned"), None);
    for bad in ["a\"b", "a\nb"] {
        assert!(matches!(new(CreateType::Vmfs, &[flat(bad)]), Err(DescriptorError::Unwritable { .. })));
    }
    let many = vec![flat("name-f001.vmdk"); 40_000];
    assert!(matches!(new(CreateType::TwoGbMaxExtentFlat, &many), Err(DescriptorError::TooLong { .. })));
}

#[test]
fn split_sizes_add_up() {
    assert_eq!(
        extent_sizes(true, SPLIT_EXTENT_SECTORS * 2 + 5).collect::<Vec<_>>(),
        [SPLIT_EXTENT_SECTORS, SPLIT_EXTENT_SECTORS, 5]
    );
    assert_eq!(extent_sizes(false, 77).collect::<Vec<_>>(), [77]);
    assert_eq!(extent_sizes(true, 0).count(), 0);
}

proptest! {
    #[test]
    fn any_bytes_give_a_descriptor_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Descriptor::parse(&bytes);
        let _ = super::super::recognise(&bytes);
    }

    #[test]
    fn mutated_descriptors_never_panic_and_keep_their_text(
        edits in proptest::collection::vec((0..ESXI.len(), any::<u8>()), 0..8), cut in 0..=ESXI.len(), cid in any::<u32>())
    {
        let mut bytes = ESXI.as_bytes().to_vec();
        for (at, byte) in edits { bytes[at] = byte; }
        bytes.truncate(cut);
        if let Ok(mut d) = Descriptor::parse(&bytes) {
            let text = d.text();
            prop_assert!(bytes.starts_with(text.as_bytes()));
            let lines = text.lines().count();
            d.set_cid(cid);
            prop_assert_eq!(d.text().lines().count(), lines);
            prop_assert_eq!(Descriptor::parse(d.text().as_bytes()).unwrap().cid(), cid);
            d.drop_change_tracking(true);
            prop_assert!(Descriptor::parse(d.text().as_bytes()).is_ok());
        }
    }

    #[test]
    fn written_extents_parse_back(sizes in proptest::collection::vec(1_u64..1 << 40, 1..20), name in "[a-zA-Z0-9 =._-]{1,30}") {
        let extents: Vec<_> = sizes.iter().map(|n| Extent { sectors: *n, ..flat(&name) }).collect();
        let d = new(CreateType::TwoGbMaxExtentFlat, &extents).unwrap();
        prop_assert_eq!(d.extents(), &extents[..]);
    }

    #[test]
    fn disk_uuids_parse_back(bytes in any::<[u8; 16]>()) {
        prop_assert_eq!(DiskUuid::parse(&DiskUuid(bytes).to_string()), Some(DiskUuid(bytes)));
    }
}
