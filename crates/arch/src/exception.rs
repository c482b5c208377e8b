//! Exceptions: their vectors and what is pushed with them (Intel SDM 3A 6.15).

/// An exception vector (Intel SDM 3A table 6-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    X87FloatingPoint = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdFloatingPoint = 19,
}

impl Vector {
    /// The exception of that number.
    pub const fn of(number: u8) -> Option<Self> {
        Some(match number {
            0 => Vector::DivideError,
            1 => Vector::Debug,
            2 => Vector::Nmi,
            3 => Vector::Breakpoint,
            4 => Vector::Overflow,
            5 => Vector::BoundRange,
            6 => Vector::InvalidOpcode,
            7 => Vector::DeviceNotAvailable,
            8 => Vector::DoubleFault,
            10 => Vector::InvalidTss,
            11 => Vector::SegmentNotPresent,
            12 => Vector::StackFault,
            13 => Vector::GeneralProtection,
            14 => Vector::PageFault,
            16 => Vector::X87FloatingPoint,
            17 => Vector::AlignmentCheck,
            18 => Vector::MachineCheck,
            19 => Vector::SimdFloatingPoint,
            _ => return None,
        })
    }

    /// Whether delivery pushes an error code (Intel SDM 3A 6.13).
    pub const fn has_error_code(self) -> bool {
        matches!(
            self,
            Vector::DoubleFault
                | Vector::InvalidTss
                | Vector::SegmentNotPresent
                | Vector::StackFault
                | Vector::GeneralProtection
                | Vector::PageFault
                | Vector::AlignmentCheck
        )
    }
}

/// An exception raised by an instruction, before its delivery through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    pub vector: Vector,
    /// Pushed only where [`Vector::has_error_code`].
    pub error_code: u32,
    /// What goes to CR2 (page faults only).
    pub fault_address: u64,
    /// What is merged into DR6 on delivery (debug exceptions only).
    pub dr6: u64,
}

impl Exception {
    pub const fn new(vector: Vector) -> Self {
        Self::with_code(vector, 0)
    }

    pub const fn with_code(vector: Vector, error_code: u32) -> Self {
        Exception { vector, error_code, fault_address: 0, dr6: 0 }
    }

    /// #UD
    pub const fn invalid_opcode() -> Self {
        Self::new(Vector::InvalidOpcode)
    }

    /// #GP(error_code)
    pub const fn general_protection(error_code: u32) -> Self {
        Self::with_code(Vector::GeneralProtection, error_code)
    }

    /// #NM
    pub const fn device_not_available() -> Self {
        Self::new(Vector::DeviceNotAvailable)
    }

    /// #PF(error_code) at `address`
    pub const fn page_fault(error_code: u32, address: u64) -> Self {
        Exception { vector: Vector::PageFault, error_code, fault_address: address, dr6: 0 }
    }

    /// #DB; `dr6` has the bits that delivery sets.
    pub const fn debug(dr6: u64) -> Self {
        Exception { vector: Vector::Debug, error_code: 0, fault_address: 0, dr6 }
    }
}

/// Page-fault error code bits (Intel SDM 3A 4.7).
pub mod pf {
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
    pub const PROTECTION_KEY: u32 = 1 << 5;
}
