//! Recognising Azure's temporary disk, whose content is gone after every redeploy and which must not be replicated.
//!
//! Invariants: positions on the VMBus count only on a machine that says it runs in Azure, because on other Hyper-V
//! hosts the same position holds an ordinary disk; every other fact speaks for itself. The reason names the fact.
//! Called by [`super::classify`].

use std::path::PathBuf;

use super::sysfs::attribute;
use super::{Disk, SystemRoot};

/// The chassis asset tag of every Azure machine.
const AZURE_ASSET_TAG: &str = "7783-7084-3265-9085-8269-3286-77";
/// The second IDE channel's VMBus device: the temporary disk of a first-generation machine.
const GENERATION_1_RESOURCE: &str = "{00000000-0001-";
/// The first SCSI controller's VMBus device: unit 0 is the OS disk, unit 1 the temporary disk of generation 2.
const GENERATION_2_CONTROLLER: &str = "{f8b3781a-1e82-4818-a1c3-63d806ec15bb}";
/// Begin of the model of Azure's local NVMe disks.
const LOCAL_NVME_MODEL: &str = "Microsoft NVMe Direct Disk";
/// The file Azure's provisioning puts on the temporary disk.
const WARNING_FILE: &str = "DATALOSS_WARNING_README.txt";
/// Label Azure formats the temporary disk with.
const LABEL: &str = "Temporary Storage";

/// What the machine as a whole says.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    root: SystemRoot,
    in_azure: bool,
    /// The device that the guest tools' symlink names.
    linked: Option<String>,
    /// The device (or partition) that carries the label.
    labelled: Option<String>,
}

impl Facts {
    pub(super) fn read(root: &SystemRoot) -> Self {
        let tag = attribute(&root.join("sys/class/dmi/id/chassis_asset_tag"));
        let follow = |link: &str| {
            let link = PathBuf::from(link);
            root.join(&link).symlink_metadata().ok()?;
            root.device_name(link)
        };
        Self {
            root: root.clone(),
            in_azure: tag.as_deref() == Some(AZURE_ASSET_TAG),
            linked: ["dev/disk/azure/resource", "dev/disk/cloud/azure_resource"].into_iter().find_map(follow),
            labelled: follow("dev/disk/by-label/Temporary\\x20Storage"),
        }
    }

    /// Why `disk` is the temporary disk; `None` when nothing says so.
    pub(super) fn temporary(&self, disk: &Disk) -> Option<String> {
        let is = |name: &String| *name == disk.name || disk.partitions.iter().any(|part| part.name == *name);
        if self.linked.as_ref().is_some_and(is) {
            return Some("the guest tools name it as Azure's resource disk".to_owned());
        }
        if disk.model.as_deref().is_some_and(|model| model.starts_with(LOCAL_NVME_MODEL)) {
            return Some("an Azure local NVMe disk".to_owned());
        }
        if let Some(fact) = self.bus_position(disk) {
            return Some(fact);
        }
        if self.labelled.as_ref().is_some_and(is)
            || disk.partitions.iter().any(|p| p.label.as_deref() == Some(LABEL))
        {
            return Some(format!("it carries the label \"{LABEL}\""));
        }
        let warned = disk
            .mounts
            .iter()
            .map(|mount| mount.mount_point.as_str())
            .find(|point| *point != "/" && self.root.join(point).join(WARNING_FILE).is_file());
        warned.map(|point| format!("{point}/{WARNING_FILE} says so"))
    }

    /// The resource disk's place on the VMBus: nearest ancestor in sysfs with a `device_id`.
    fn bus_position(&self, disk: &Disk) -> Option<String> {
        if !self.in_azure {
            return None;
        }
        let path = std::fs::canonicalize(self.root.join("sys/block").join(&disk.name)).ok()?;
        let id = path.ancestors().find_map(|dir| attribute(&dir.join("device_id")))?.to_lowercase();
        if id.starts_with(GENERATION_1_RESOURCE) {
            return Some("it stands on the second IDE channel, Azure's resource disk".to_owned());
        }
        // The SCSI address `host:channel:target:unit` is the directory that the `device` link leads to.
        let address = std::fs::canonicalize(path.join("device")).ok()?;
        let unit = address.file_name()?.to_str()?.rsplit_once(':')?.1.to_owned();
        (id == GENERATION_2_CONTROLLER && unit == "1")
            .then(|| "it is unit 1 of the first SCSI controller, Azure's resource disk".to_owned())
    }
}
