use super::*;
use crate::codegen::block::{Workspace, translate};
use crate::codegen::decode::GuestCode;
use crate::mode::{CodeSegment, Mode};
use crate::testing::{kernel_vcpu, setting};

#[test]
fn a_record_says_what_translation_said() {
    let program = std::fs::read("/proc/self/exe").unwrap();
    let start = (program.len() / 8) & !0xfff;
    let mode = Mode::of(&kernel_vcpu());
    let setting = setting(mode);
    let (mut writer, mut sites, mut packed) = (Writer::default(), 0, 0);
    for (i, page) in program[start..start + (64 << 12)].chunks(4096).enumerate() {
        for offset in (i % 7..4000).step_by(37) {
            let code = GuestCode { page, offset, segment: CodeSegment::FLAT };
            let t = translate(code, 0x7f12_3456_7000 + offset as u64, &setting, &mut Workspace::default()).unwrap();
            let bytes = &page[offset..(offset + t.guest_length).min(page.len())];
            let all = [writer.pack(bytes, &t), &[0xff; 3]].concat();
            let record = Record::read(&all);
            assert_eq!(record.packed.len() + 3, all.len());
            assert_eq!((record.bytes, record.lookahead()), (bytes, t.lookahead.clone()));
            assert_eq!(record.links().collect::<Vec<_>>(), t.links);
            assert_eq!(record.relocations().collect::<Vec<_>>(), t.relocations);
            let ends = t.points.iter().skip(1).map(|p| p.host_offset).chain([t.end]);
            for (point, end) in t.points.iter().zip(ends) {
                if point.host_offset != end {
                    assert_eq!(record.point_at(point.host_offset), Some(*point));
                    assert_eq!(record.point_at(end - 1), Some(*point));
                }
            }
            for site in &t.sites {
                let index = usize::from(site.point);
                let end = t.points.get(index + 1).map_or(t.end, |p| p.host_offset);
                assert_eq!(record.site(site.return_offset), Some((t.points[index], end, site.parked)));
                assert_eq!(record.site(site.return_offset + 1), None);
                sites += 1;
            }
            packed += record.packed.len() - bytes.len();
        }
    }
    assert!(sites > 10_000);
    assert!(packed < sites * 40, "{packed} bytes for {sites} slow paths");
}
