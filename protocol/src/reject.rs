//! What a peer is told when something is refused: a code, never our error text.

use bincode::de::{BorrowDecode, BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $retry:literal;)+) => {
        /// Reason of a refusal as the peer sees it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum RejectCode { $($(#[$doc])* $name = $number,)+ }

        impl RejectCode {
            /// Stable number of the code, also used as the QUIC application error.
            #[must_use]
            pub const fn number(self) -> u16 {
                match self { $(Self::$name => $number,)+ }
            }

            /// Whether the same request may succeed later.
            #[must_use]
            pub const fn is_retryable(self) -> bool {
                match self { $(Self::$name => $retry,)+ }
            }

            /// The code with this number.
            #[must_use]
            pub const fn from_number(number: u64) -> Option<Self> {
                match number { $($number => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

codes! {
    /// No common protocol version.
    Version = 1, false;
    /// The certificate's identity is not the one claimed, or of another consortium.
    Identity = 2, false;
    /// Not a member of the charter.
    NotMember = 3, false;
    /// Undecodable frame, message or chunk.
    Malformed = 4, false;
    /// Larger than its kind allows.
    TooLarge = 5, false;
    /// Signature does not verify.
    Signature = 6, false;
    /// Signed for another round or another manifest.
    WrongRound = 7, false;
    /// The phase of the round does not take this.
    WrongPhase = 8, false;
    /// The slot holds different bytes already.
    Equivocation = 9, false;
    /// The received bytes do not have the announced digest.
    Digest = 10, true;
    /// The reference set is not the manifest's.
    WrongReference = 11, false;
    /// The pivot is not the manifest's.
    WrongPivot = 12, false;
    /// The content breaks a rule of its format.
    Content = 13, false;
    /// Nothing with this digest is here.
    NotFound = 14, true;
    /// No room at the moment.
    Busy = 15, true;
    /// The disk is full.
    Storage = 16, true;
    /// The peer stopped sending.
    TimedOut = 17, true;
    /// The peer is shutting down.
    ShuttingDown = 18, true;
    /// A fault on our side.
    Internal = 19, true;
}

impl std::fmt::Display for RejectCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?} ({})", self.number())
    }
}

impl Encode for RejectCode {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.number().encode(encoder)
    }
}

impl<C> Decode<C> for RejectCode {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let number = u16::decode(decoder)?;
        Self::from_number(number.into()).ok_or(DecodeError::Other("unknown reject code"))
    }
}

impl<'de, C> BorrowDecode<'de, C> for RejectCode {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(
        decoder: &mut D,
    ) -> Result<Self, DecodeError> {
        Self::decode(decoder)
    }
}
