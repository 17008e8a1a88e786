#!/bin/sh
# Keys for teachers and students:   make_keys.sh FOLDER [NAME...]
#
#   ca.pem, ca.key          our own certificate authority; ca.key signs and stays where you run this
#   server.pem, server.key  a teacher's, valid for every NAME (host names or IP addresses) and for localhost
#   client.pem, client.key  a student's, for mTLS
#   token                   what students send with every call: one line of 64 hex digits
#
# What is there stays, what is missing is made, and a certificate that ends within 30 days or lacks a NAME is made anew.
# A running teacher takes up the new files by itself. Needs openssl (1.1.1 or later).
set -eu
umask 077

folder=${1:?"usage: make_keys.sh FOLDER [NAME...]"}
shift
mkdir -p "$folder"
cd "$folder"
work=$(mktemp -d ./.making.XXXXXX)
trap 'rm -rf "$work"' EXIT

is_address() { case $1 in *:*) return 0 ;; *[!0-9.]*) return 1 ;; *) return 0 ;; esac; }

alternatives() {
    list=DNS:localhost,IP:127.0.0.1,IP:::1
    for name; do
        if is_address "$name"; then list=$list,IP:$name; else list=$list,DNS:$name; fi
    done
    echo "$list"
}

covers() { # CERTIFICATE NAME...
    certificate=$1
    shift
    for name; do
        if is_address "$name"; then check=-checkip; else check=-checkhost; fi
        openssl x509 -in "$certificate" -noout $check "$name" | grep -q 'does match' || return 1
    done
}

lasts() { [ -s "$1.pem" ] && [ -s "$1.key" ] && openssl x509 -in "$1.pem" -noout -checkend 2592000 >/dev/null; }

new_key() { openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out "$1"; }

signed() { # KIND COMMON_NAME EXTENSIONS: the key first, so that no certificate is ever there without its key
    [ -s ca.key ] || { echo "$folder/ca.key is not here to sign $1.pem: bring it back, or begin in an empty folder" >&2; exit 1; }
    new_key "$work/$1.key"
    openssl req -new -key "$work/$1.key" -subj "/CN=$2" -out "$work/$1.csr"
    printf '%s\n' "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" "$3" >"$work/$1.ext"
    openssl x509 -req -in "$work/$1.csr" -CA ca.pem -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" -days 825 \
        -sha256 -extfile "$work/$1.ext" -out "$work/$1.pem" 2>/dev/null
    chmod 644 "$work/$1.pem"
    mv "$work/$1.key" "$1.key"
    mv "$work/$1.pem" "$1.pem"
    echo "made $folder/$1.pem"
}

if ! [ -s ca.pem ]; then
    new_key "$work/ca.key"
    openssl req -new -x509 -key "$work/ca.key" -subj "/CN=funmatch authority $(openssl rand -hex 4)" -days 3650 -sha256 \
        -addext "keyUsage=critical,keyCertSign,cRLSign" -out "$work/ca.pem"
    chmod 644 "$work/ca.pem"
    mv "$work/ca.key" ca.key
    mv "$work/ca.pem" ca.pem
    rm -f server.pem client.pem # signed by another one
    echo "made $folder/ca.pem"
fi
if ! lasts server || ! covers server.pem "$@"; then
    signed server "${1:-localhost}" "extendedKeyUsage=serverAuth
subjectAltName=$(alternatives "$@")"
fi
lasts client || signed client "funmatch student" "extendedKeyUsage=clientAuth"
if ! [ -s token ]; then
    openssl rand -hex 32 >"$work/token"
    mv "$work/token" token
    echo "made $folder/token"
fi
